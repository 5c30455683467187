/* SPDX-License-Identifier: Apache-2.0 */
/* AF_VSOCK sockets that fail loudly. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/sockios.h>

#include "vsock_test.h"

int vsock_socket(int type)
{
	int fd = socket(AF_VSOCK, type, 0);

	if (fd < 0)
		fail_errno("socket");
	return fd;
}

int vsock_connect_to(int fd, unsigned int cid, unsigned int port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
	int result;

	do
		result = connect(fd, (struct sockaddr *)&address, sizeof(address));
	while (result < 0 && errno == EINTR);
	return result;
}

int vsock_bound(unsigned int port, int type)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int fd = vsock_socket(type);

	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		fail_errno("bind");
	return fd;
}

int vsock_listening(unsigned int port, int type)
{
	int fd = vsock_bound(port, type);

	if (listen(fd, 128))
		fail_errno("listen");
	return fd;
}

int vsock_connected(int type)
{
	control_expect("LISTENING");
	int fd = vsock_socket(type);
	if (vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail_errno("connect");
	return fd;
}

int accept_one(int listener)
{
	int fd;

	do
		fd = accept(listener, NULL, NULL);
	while (fd < 0 && errno == EINTR);
	if (fd < 0)
		fail_errno("accept");
	return fd;
}

int vsock_accepted(int type)
{
	struct sockaddr_vm address;
	socklen_t size = sizeof(address);
	int listener = vsock_listening(options.peer_port, type);

	control_put("LISTENING");
	int fd = accept_one(listener);
	if (getpeername(fd, (struct sockaddr *)&address, &size))
		fail_errno("getpeername");
	if (size != sizeof(address) || address.svm_family != AF_VSOCK || address.svm_cid != options.peer_cid)
		fail("the peer is %u, of family %u", address.svm_cid, address.svm_family);
	close(listener);
	return fd;
}

static void check(const char *what, ssize_t result, size_t done, ssize_t expected)
{
	if (expected < 0) {
		if (result != -1)
			fail("%s is %zd, expected %s", what, result, strerror(-expected));
		if (errno != -expected)
			fail("%s: %s, expected %s", what, strerror(errno), strerror(-expected));
	} else if (result < 0) {
		fail_errno(what);
	} else if ((ssize_t)done != expected) {
		fail("%s: %zu bytes, expected %zd", what, done, expected);
	}
}

void send_all(int fd, const void *data, size_t size, int flags, ssize_t expected)
{
	size_t done = 0;
	ssize_t result;

	do {
		result = send(fd, (const char *)data + done, size - done, flags | MSG_NOSIGNAL);
		if (result > 0)
			done += result;
	} while ((result > 0 && done < size) || (result < 0 && errno == EINTR));
	check("send", result, done, expected);
}

void receive_all(int fd, void *data, size_t size, int flags, ssize_t expected)
{
	size_t done = 0;
	ssize_t result;

	do {
		result = recv(fd, (char *)data + done, size - done, flags);
		if (result > 0)
			done += result;
	} while ((result > 0 && done < size) || (result < 0 && errno == EINTR));
	check("recv", result, done, expected);
}

void send_byte(int fd, ssize_t expected)
{
	send_all(fd, "A", 1, 0, expected);
}

void receive_byte(int fd, ssize_t expected)
{
	char byte = 0;

	receive_all(fd, &byte, 1, 0, expected);
	if (expected > 0 && byte != 'A')
		fail("recv: byte %#x, expected 'A'", byte);
}

void wait_remote_close(int fd)
{
	struct pollfd poller = {.fd = fd, .events = POLLRDHUP | POLLHUP};

	if (poll(&poller, 1, -1) < 0)
		fail_errno("poll");
	if (!(poller.revents & (POLLRDHUP | POLLHUP)))
		fail("poll: %#x, expected the remote's close", poller.revents);
}

bool wait_sent(int fd)
{
	int left;

	do {
		if (ioctl(fd, SIOCOUTQ, &left)) {
			if (errno == EOPNOTSUPP || errno == ENOTTY)
				return false;
			fail_errno("SIOCOUTQ");
		}
		if (left)
			usleep(1000);
	} while (left);
	return true;
}

void set_u64(int fd, int option, uint64_t value)
{
	uint64_t found = ~value;
	socklen_t size = sizeof(found);

	if (setsockopt(fd, AF_VSOCK, option, &value, sizeof(value)) || getsockopt(fd, AF_VSOCK, option, &found, &size))
		fail_errno("setsockopt of AF_VSOCK");
	if (found != value)
		fail("socket option %d is %llu, expected %llu", option, (unsigned long long)found,
		     (unsigned long long)value);
}

void set_int(int fd, int option, int value)
{
	if (setsockopt(fd, SOL_SOCKET, option, &value, sizeof(value)))
		fail_errno("setsockopt");
}

void set_linger(int fd, int seconds)
{
	struct linger linger = {.l_onoff = 1, .l_linger = seconds};

	if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)))
		fail_errno("SO_LINGER");
}

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* D. J. Bernstein's: 33 times the sum so far, and a byte. Both halves tell each other what they have seen by it. */
unsigned long hash_djb2(const void *data, size_t size)
{
	const unsigned char *bytes = data;
	unsigned long hash = 5381;

	for (size_t at = 0; at < size; at++)
		hash = 33 * hash + bytes[at];
	return hash;
}

bool loopback_pair(int type, int fds[2])
{
	struct sockaddr_vm local = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL, .svm_port = VMADDR_PORT_ANY};
	socklen_t size = sizeof(local);
	int listener = vsock_socket(type);
	bool done = false;

	if (!bind(listener, (struct sockaddr *)&local, sizeof(local)) && !listen(listener, 1) &&
	    !getsockname(listener, (struct sockaddr *)&local, &size)) {
		fds[0] = vsock_socket(type);
		done = !vsock_connect_to(fds[0], VMADDR_CID_LOCAL, local.svm_port);
		if (done)
			fds[1] = accept_one(listener);
		else
			close(fds[0]);
	}
	close(listener);
	return done;
}

void *allocate(size_t size)
{
	void *data = malloc(size ? size : 1);

	if (!data)
		fail_errno("malloc");
	return data;
}

void fill_random(void *data, size_t size)
{
	for (size_t at = 0; at < size; at++)
		((unsigned char *)data)[at] = rand();
}

const char *lacks_siocoutq(enum mode mode)
{
	int fds[2], left;

	if (mode == SERVER || !loopback_pair(SOCK_STREAM, fds))
		return NULL;
	bool lacks = ioctl(fds[0], SIOCOUTQ, &left) && (errno == EOPNOTSUPP || errno == ENOTTY);
	close(fds[0]);
	close(fds[1]);
	return lacks ? "no SIOCOUTQ in this kernel" : NULL;
}
