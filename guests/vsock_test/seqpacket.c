/* SPDX-License-Identifier: Apache-2.0 */
/* Messages: the cases of the kernel's tools/testing/vsock, by its names and with its words on the control connection. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vsock_test.h"

#define PAGE 4096
#define PAGES_MAX 4
#define BUFFER (2 * 1024 * 1024)
#define TRUNCATED 32
#define PEEKED 64

static void bounds_client(void)
{
	size_t most = PAGES_MAX * PAGE;
	int count = BUFFER / most;
	unsigned long hash = 0;
	char *data = allocate(most);
	int fd = vsock_connected(SOCK_SEQPACKET);

	/* A kernel sends no more ahead than it would receive. */
	set_u64(fd, SO_VM_SOCKETS_BUFFER_MAX_SIZE, BUFFER);
	set_u64(fd, SO_VM_SOCKETS_BUFFER_SIZE, BUFFER);
	control_expect("SRVREADY");
	for (int at = 0; at < count; at++) {
		/* Small ones and large ones; at least one has MSG_EOR. */
		size_t size = at & 1 ? PAGE + rand() % (most - PAGE) : 1 + (size_t)rand() % PAGE;
		int flags = at == count / 2 || rand() & 1 ? MSG_EOR : 0;

		memset(data, rand(), size);
		send_all(fd, data, size, flags, size);
		hash += (flags != 0) + hash_djb2(data, size);
	}
	control_put("SENDDONE");
	control_put("%lu", hash);
	free(data);
	close(fd);
}

static void bounds_server(void)
{
	size_t most = PAGES_MAX * PAGE;
	unsigned long hash = 0;
	char *data = allocate(most);
	struct iovec vector = {.iov_base = data, .iov_len = most};
	int fd = vsock_accepted(SOCK_SEQPACKET);

	set_u64(fd, SO_VM_SOCKETS_BUFFER_MAX_SIZE, BUFFER);
	set_u64(fd, SO_VM_SOCKETS_BUFFER_SIZE, BUFFER);
	control_put("SRVREADY");
	control_expect("SENDDONE");
	for (;;) {
		struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
		ssize_t size = recvmsg(fd, &message, 0);

		if (size < 0)
			fail_errno("recvmsg");
		if (!size)
			break;
		hash += !!(message.msg_flags & MSG_EOR) + hash_djb2(data, size);
	}
	free(data);
	close(fd);
	if (control_number() != hash)
		fail("other messages than were sent");
}

static void truncated_client(void)
{
	char data[TRUNCATED] = {0};
	int fd = vsock_connected(SOCK_SEQPACKET);

	send_all(fd, data, sizeof(data), 0, sizeof(data));
	control_put("SENDDONE");
	close(fd);
}

static void truncated_server(void)
{
	char data[TRUNCATED / 2];
	struct iovec vector = {.iov_base = data, .iov_len = sizeof(data)};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
	int fd = vsock_accepted(SOCK_SEQPACKET);

	control_expect("SENDDONE");
	ssize_t size = recvmsg(fd, &message, MSG_TRUNC);
	if (size != TRUNCATED || !(message.msg_flags & MSG_TRUNC))
		fail("recvmsg: %zd, flags %#x", size, message.msg_flags);
	close(fd);
}

static void timeout_client(void)
{
	struct timeval second = {.tv_sec = 1};
	char byte;
	int fd = vsock_connected(SOCK_SEQPACKET);

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second)))
		fail_errno("SO_RCVTIMEO");
	uint64_t before = now_ns();
	receive_all(fd, &byte, 1, 0, -EAGAIN);
	/* How much longer it takes depends on what else the host does. */
	if (now_ns() - before < 990000000)
		fail("recv: %llu ns, expected a second", (unsigned long long)(now_ns() - before));
	control_put("WAITDONE");
	close(fd);
}

static void timeout_server(void)
{
	int fd = vsock_accepted(SOCK_SEQPACKET);

	control_expect("WAITDONE");
	close(fd);
}

static void hole_client(void)
{
	char data[3 * PAGE];
	int fd = vsock_connected(SOCK_SEQPACKET);

	memset(data, 'a', sizeof(data));
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	memset(data, 'b', sizeof(data));
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	close(fd);
}

static void hole_server(void)
{
	char valid[3 * PAGE];
	int fd = vsock_accepted(SOCK_SEQPACKET);
	char *holed = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (holed == MAP_FAILED || munmap(holed + PAGE, PAGE))
		fail_errno("mmap");
	ssize_t size = read(fd, holed, 3 * PAGE);
	/* ENOMEM in kernels before 6.5. */
	if (size != -1 || (errno != EFAULT && errno != ENOMEM))
		fail("read into a hole: %zd, %s", size, strerror(errno));
	/* That message is lost; the next is whole. */
	size = read(fd, valid, sizeof(valid));
	if (size != sizeof(valid))
		fail("read: %zd", size);
	for (size_t at = 0; at < sizeof(valid); at++)
		if (valid[at] != 'b')
			fail("byte %zu is %#x", at, valid[at]);
	munmap(holed, PAGE);
	munmap(holed + 2 * PAGE, PAGE);
	close(fd);
}

static void big_client(void)
{
	uint64_t size = 0;
	socklen_t length = sizeof(size);
	int fd = vsock_connected(SOCK_SEQPACKET);

	if (getsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size, &length))
		fail_errno("SO_VM_SOCKETS_BUFFER_SIZE");
	size++;
	char *data = allocate(size);
	memset(data, 0, size);
	send_all(fd, data, size, 0, -EMSGSIZE);
	control_put("CLISENT");
	free(data);
	close(fd);
}

static void big_server(void)
{
	int fd = vsock_accepted(SOCK_SEQPACKET);

	control_expect("CLISENT");
	close(fd);
}

static void invalid_client(void)
{
	char data[512];
	int fd = vsock_connected(SOCK_SEQPACKET);

	control_expect("SENDDONE");
	receive_all(fd, NULL, sizeof(data), 0, -EFAULT);
	receive_all(fd, data, sizeof(data), MSG_DONTWAIT, -EAGAIN);
	control_put("DONE");
	close(fd);
}

static void invalid_server(void)
{
	char data[512] = {0};
	int fd = vsock_accepted(SOCK_SEQPACKET);

	send_all(fd, data, sizeof(data), 0, sizeof(data));
	control_put("SENDDONE");
	control_expect("DONE");
	close(fd);
}

static void peek_client(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_connected(SOCK_SEQPACKET);

	fill_random(data, sizeof(data));
	control_expect("SRVREADY");
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	close(fd);
}

static void peek_server(void)
{
	unsigned char half[PEEKED / 2], peeked[PEEKED], data[PEEKED];
	int fd = vsock_accepted(SOCK_SEQPACKET);

	receive_all(fd, peeked, sizeof(peeked), MSG_PEEK | MSG_DONTWAIT, -EAGAIN);
	control_put("SRVREADY");
	receive_all(fd, half, sizeof(half), MSG_PEEK, sizeof(half));
	receive_all(fd, peeked, sizeof(peeked), MSG_PEEK, sizeof(peeked));
	ssize_t size = recv(fd, half, sizeof(half), MSG_PEEK | MSG_TRUNC);
	if (size != PEEKED)
		fail("recv with MSG_TRUNC: %zd", size);
	receive_all(fd, data, sizeof(data), 0, sizeof(data));
	if (memcmp(half, peeked, sizeof(half)) || memcmp(peeked, data, sizeof(data)))
		fail("what was peeked at is not what was received");
	close(fd);
}

/* Kernels before 6.5 take what should only be peeked at. */
static const char *lacks_peek(enum mode mode)
{
	int fds[2];
	char byte;

	if (mode == CLIENT || !loopback_pair(SOCK_SEQPACKET, fds))
		return NULL;
	send_all(fds[0], "A", 1, 0, 1);
	bool lacks = recv(fds[1], &byte, 1, MSG_PEEK) != 1 || recv(fds[1], &byte, 1, MSG_DONTWAIT) != 1;
	close(fds[0]);
	close(fds[1]);
	return lacks ? "no MSG_PEEK for messages in this kernel" : NULL;
}

static int errno_of_invalid(int type)
{
	int fds[2], code = EFAULT;

	if (!loopback_pair(type, fds))
		return code;
	send_all(fds[0], "A", 1, 0, 1);
	if (recv(fds[1], NULL, 1, 0) < 0)
		code = errno;
	close(fds[0]);
	close(fds[1]);
	return code;
}

/* Ours takes either errno; the kernel's own program is of one mind, which depends on its version. */
static const char *lacks_efault(enum mode mode)
{
	bool old = !listed("SOCK_SEQPACKET big message");

	if (mode == CLIENT || !options.kernels_program || errno_of_invalid(SOCK_SEQPACKET) == (old ? ENOMEM : EFAULT))
		return NULL;
	return "another errno in this kernel";
}

/* Kernels before 6.5 have ENOMEM for whatever a transport says. */
static const char *lacks_emsgsize(enum mode mode)
{
	int fds[2];
	uint64_t size = 0;
	socklen_t length = sizeof(size);

	if (mode == SERVER || !loopback_pair(SOCK_SEQPACKET, fds))
		return NULL;
	getsockopt(fds[0], AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size, &length);
	char *data = allocate(size + 1);
	memset(data, 0, size + 1);
	bool lacks = send(fds[0], data, size + 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == ENOMEM;
	free(data);
	close(fds[0]);
	close(fds[1]);
	return lacks ? "another errno in this kernel" : NULL;
}

static const char *lacks_invalid(enum mode mode)
{
	return mode == CLIENT && errno_of_invalid(SOCK_SEQPACKET) != EFAULT ? "another errno in this kernel" : NULL;
}

const char *lacks_stream_efault(enum mode mode)
{
	return mode == CLIENT && errno_of_invalid(SOCK_STREAM) != EFAULT ? "another errno in this kernel" : NULL;
}

static void unsent_client(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_connected(SOCK_SEQPACKET);

	fill_random(data, sizeof(data));
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	control_expect("RECEIVED");
	wait_sent(fd);
	close(fd);
}

static void unsent_server(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_accepted(SOCK_SEQPACKET);

	receive_all(fd, data, sizeof(data), 0, sizeof(data));
	control_put("RECEIVED");
	close(fd);
}

const struct test_case seqpacket_cases[] = {
	{"SOCK_SEQPACKET msg bounds", bounds_client, bounds_server},
	{"SOCK_SEQPACKET MSG_TRUNC flag", truncated_client, truncated_server},
	{"SOCK_SEQPACKET timeout", timeout_client, timeout_server},
	{"SOCK_SEQPACKET invalid receive buffer", hole_client, hole_server, lacks_efault},
	{"SOCK_SEQPACKET big message", big_client, big_server, lacks_emsgsize},
	{"SOCK_SEQPACKET test invalid buffer", invalid_client, invalid_server, lacks_invalid},
	{"SOCK_SEQPACKET MSG_PEEK", peek_client, peek_server, lacks_peek},
	{"SOCK_SEQPACKET ioctl(SIOCOUTQ) 0 unsent bytes", unsent_client, unsent_server, lacks_siocoutq},
	{NULL, NULL, NULL},
};
