/* SPDX-License-Identifier: Apache-2.0 */
/* Streams: the cases of the kernel's tools/testing/vsock, by its names and with its words on the control connection. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "vsock_test.h"

#define CONNECTIONS 100
#define PEEKED 64
#define WATER 128
#define CREDIT_BUFFER (128 * 1024)
#define PACKET_MAX (64 * 1024)
#define GOES_ON 1
#define IS_DONE 0
#define STRESS_NS 2000000000ull
#define LINGER_S 5

static void expect_reset(void)
{
	int fd = vsock_socket(SOCK_STREAM);

	if (!vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail("connect: a connection, expected none");
	if (errno != ECONNRESET)
		fail_errno("connect, expected a reset");
	close(fd);
}

static void connection_reset_client(void)
{
	expect_reset();
}

static void bind_only_client(void)
{
	control_expect("BIND");
	expect_reset();
	control_put("DONE");
}

static void bind_only_server(void)
{
	int fd = vsock_bound(options.peer_port, SOCK_STREAM);

	control_put("BIND");
	control_expect("DONE");
	close(fd);
}

static void sends_and_closes(int fd)
{
	send_byte(fd, 1);
	close(fd);
}

/* The peer has closed: nothing can be sent, what it has sent can be read, then comes the end. */
static void reads_behind_close(int fd)
{
	wait_remote_close(fd);
	send_byte(fd, -EPIPE);
	if (!options.no_read_after_close) {
		receive_byte(fd, 1);
		receive_byte(fd, 0);
	}
	close(fd);
}

static void client_close_client(void)
{
	sends_and_closes(vsock_connected(SOCK_STREAM));
}

static void client_close_server(void)
{
	reads_behind_close(vsock_accepted(SOCK_STREAM));
}

static void server_close_client(void)
{
	reads_behind_close(vsock_connected(SOCK_STREAM));
}

static void server_close_server(void)
{
	sends_and_closes(vsock_accepted(SOCK_STREAM));
}

static void connections_client(void)
{
	int fds[CONNECTIONS];

	for (int at = 0; at < CONNECTIONS; at++)
		fds[at] = vsock_connected(SOCK_STREAM);
	for (int at = 0; at < CONNECTIONS; at++)
		if (at % 2)
			receive_byte(fds[at], 1);
		else
			send_byte(fds[at], 1);
	for (int at = 0; at < CONNECTIONS; at++)
		close(fds[at]);
}

static void connections_server(void)
{
	int fds[CONNECTIONS];

	for (int at = 0; at < CONNECTIONS; at++)
		fds[at] = vsock_accepted(SOCK_STREAM);
	for (int at = 0; at < CONNECTIONS; at++)
		if (at % 2)
			send_byte(fds[at], 1);
		else
			receive_byte(fds[at], 1);
	for (int at = 0; at < CONNECTIONS; at++)
		close(fds[at]);
}

static void peek_client(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_connected(SOCK_STREAM);

	fill_random(data, sizeof(data));
	control_expect("SRVREADY");
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	close(fd);
}

static void peek_server(void)
{
	unsigned char half[PEEKED / 2], peeked[PEEKED], data[PEEKED];
	int fd = vsock_accepted(SOCK_STREAM);

	receive_all(fd, peeked, sizeof(peeked), MSG_PEEK | MSG_DONTWAIT, -EAGAIN);
	control_put("SRVREADY");
	receive_all(fd, half, sizeof(half), MSG_PEEK, sizeof(half));
	receive_all(fd, peeked, sizeof(peeked), MSG_PEEK, sizeof(peeked));
	receive_all(fd, data, sizeof(data), 0, sizeof(data));
	if (memcmp(half, peeked, sizeof(half)) || memcmp(peeked, data, sizeof(data)))
		fail("what was peeked at is not what was received");
	close(fd);
}

static void low_water_client(void)
{
	char data[WATER];
	struct pollfd poller = {.events = POLLIN | POLLRDNORM};

	poller.fd = vsock_connected(SOCK_STREAM);
	set_int(poller.fd, SO_RCVLOWAT, WATER);
	control_expect("SRVSENT");
	if (poll(&poller, 1, 1000) < 0)
		fail_errno("poll");
	if (poller.revents)
		fail("poll: %#x with one byte of %d", poller.revents, WATER);
	control_put("CLNSENT");
	if (poll(&poller, 1, -1) < 0)
		fail_errno("poll");
	if (poller.revents != (POLLIN | POLLRDNORM))
		fail("poll: %#x with all bytes", poller.revents);
	receive_all(poller.fd, data, sizeof(data), MSG_DONTWAIT, WATER);
	control_put("POLLDONE");
	close(poller.fd);
}

static void low_water_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	send_byte(fd, 1);
	control_put("SRVSENT");
	control_expect("CLNSENT");
	for (int at = 1; at < WATER; at++)
		send_byte(fd, 1);
	control_expect("POLLDONE");
	close(fd);
}

static void merge_client(void)
{
	int fd = vsock_connected(SOCK_STREAM);

	send_all(fd, "HELLO", 5, 0, 5);
	control_put("SEND0");
	control_expect("REPLY0");
	send_all(fd, "WORLD", 5, 0, 5);
	control_put("SEND1");
	control_expect("REPLY1");
	close(fd);
}

static void merge_server(void)
{
	char data[64];
	int fd = vsock_accepted(SOCK_STREAM);

	control_expect("SEND0");
	receive_all(fd, data, 2, 0, 2);
	control_put("REPLY0");
	control_expect("SEND1");
	receive_all(fd, data + 2, 8, 0, 8);
	receive_all(fd, data + 10, 50, MSG_DONTWAIT, -EAGAIN);
	if (memcmp(data, "HELLOWORLD", 10))
		fail("other bytes than were sent");
	control_put("REPLY1");
	close(fd);
}

static void invalid_client(void)
{
	char data[512];
	int fd = vsock_connected(SOCK_STREAM);

	control_expect("SENDDONE");
	receive_all(fd, NULL, sizeof(data), 0, -EFAULT);
	receive_all(fd, data, sizeof(data), MSG_DONTWAIT, sizeof(data));
	control_put("DONE");
	close(fd);
}

static void invalid_server(void)
{
	char data[512] = {0};
	int fd = vsock_accepted(SOCK_STREAM);

	send_all(fd, data, sizeof(data), 0, sizeof(data));
	control_put("SENDDONE");
	control_expect("DONE");
	close(fd);
}

static volatile sig_atomic_t pipe_signals;

static void on_pipe(int number)
{
	(void)number;
	pipe_signals++;
}

static void expect_pipe(int fd, int flags, bool signalled)
{
	ssize_t result;

	pipe_signals = 0;
	/* The peer's shutdown may still be on its way. */
	while ((result = send(fd, "A", 1, flags)) > 0 || errno == EINTR)
		usleep(10000);
	if (errno != EPIPE)
		fail_errno("send, expected EPIPE");
	if (!pipe_signals == signalled)
		fail("send: SIGPIPE %d times", (int)pipe_signals);
}

static void expect_pipes(int fd)
{
	signal(SIGPIPE, on_pipe);
	expect_pipe(fd, 0, true);
	expect_pipe(fd, MSG_NOSIGNAL, false);
	signal(SIGPIPE, SIG_IGN);
	control_put("CLIENTDONE");
	close(fd);
}

/* Linux 6.7 sends SIGPIPE; kernels before don't, unless they have got that since. */
const char *lacks_sigpipe(enum mode mode)
{
	int fds[2];

	if (mode == SERVER || !loopback_pair(SOCK_STREAM, fds))
		return NULL;
	signal(SIGPIPE, on_pipe);
	pipe_signals = 0;
	shutdown(fds[0], SHUT_WR);
	bool lacks = send(fds[0], "A", 1, 0) < 0 && errno == EPIPE && !pipe_signals;
	signal(SIGPIPE, SIG_IGN);
	close(fds[0]);
	close(fds[1]);
	return lacks ? "no SIGPIPE in this kernel's AF_VSOCK" : NULL;
}

static void shut_wr_client(void)
{
	int fd = vsock_connected(SOCK_STREAM);

	if (shutdown(fd, SHUT_WR))
		fail_errno("shutdown");
	expect_pipes(fd);
}

static void shut_wr_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	control_expect("CLIENTDONE");
	close(fd);
}

static void shut_rd_client(void)
{
	int fd = vsock_connected(SOCK_STREAM);

	control_expect("SHUTRDDONE");
	expect_pipes(fd);
}

static void shut_rd_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	if (shutdown(fd, SHUT_RD))
		fail_errno("shutdown");
	control_put("SHUTRDDONE");
	control_expect("CLIENTDONE");
	close(fd);
}

static void double_bind_client(void)
{
	for (int time = 0; time < 2; time++) {
		control_expect("LISTENING");
		int fd = vsock_bound(options.peer_port + 1, SOCK_STREAM);
		if (vsock_connect_to(fd, options.peer_cid, options.peer_port))
			fail_errno("connect");
		close(fd);
	}
}

static void double_bind_server(void)
{
	int fds[2], listener = vsock_listening(options.peer_port, SOCK_STREAM);

	for (int time = 0; time < 2; time++) {
		control_put("LISTENING");
		fds[time] = accept_one(listener);
		wait_remote_close(fds[time]);
	}
	close(listener);
	close(fds[0]);
	close(fds[1]);
}

static void credit_client(void)
{
	size_t size = CREDIT_BUFFER + 1;
	int fd = vsock_connected(SOCK_STREAM);
	char *data = allocate(size);

	memset(data, 'A', size);
	receive_byte(fd, 1);
	if (send(fd, data, size, 0) != (ssize_t)size)
		fail_errno("send");
	free(data);
	close(fd);
}

static void credit_server(bool low_bytes)
{
	struct pollfd poller = {.events = POLLIN | POLLRDNORM | POLLERR | POLLRDHUP | POLLHUP};
	int fd = vsock_accepted(SOCK_STREAM);
	char *data = allocate(CREDIT_BUFFER);
	size_t size = PACKET_MAX;
	ssize_t seen;

	set_u64(fd, SO_VM_SOCKETS_BUFFER_SIZE, CREDIT_BUFFER);
	if (low_bytes)
		set_int(fd, SO_RCVLOWAT, PACKET_MAX + 1);
	/* Behind the news of the buffer's size. */
	send_byte(fd, 1);
	while ((seen = recv(fd, data, CREDIT_BUFFER, MSG_PEEK)) != CREDIT_BUFFER)
		if (seen <= 0)
			fail_errno("recv");
	receive_all(fd, data, size, 0, size);
	size++;
	if (!low_bytes)
		set_int(fd, SO_RCVLOWAT, size);
	/* The last byte comes when the peer has heard of the room. */
	poller.fd = fd;
	if (poll(&poller, 1, -1) < 0)
		fail_errno("poll");
	if (poller.revents & POLLERR || !(poller.revents & POLLIN))
		fail("poll: %#x", poller.revents);
	receive_all(fd, data, size, MSG_DONTWAIT, size);
	free(data);
	close(fd);
}

/* Kernels before 6.8 say nothing of room when SO_RCVLOWAT asks for more. Our host asks; another kernel waits for ever. */
static const char *lacks_news_of_room(enum mode mode)
{
	struct utsname name;
	unsigned int major = 0, minor = 0;

	if (mode == CLIENT || options.peer_cid != VMADDR_CID_LOCAL || uname(&name) ||
	    sscanf(name.release, "%u.%u", &major, &minor) != 2 || major > 6 || (major == 6 && minor >= 8))
		return NULL;
	return "no news of room with SO_RCVLOWAT in this kernel";
}

/* A kernel that cannot tell what is unsent lingers until the peer closes, which ours does at once. */
static const char *lacks_end_of_linger(enum mode mode)
{
	return options.peer_cid == VMADDR_CID_LOCAL ? lacks_siocoutq(mode) : NULL;
}

static void credit_rcvlowat_server(void)
{
	credit_server(false);
}

static void credit_low_bytes_server(void)
{
	credit_server(true);
}

static void unsent_client(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_connected(SOCK_STREAM);

	fill_random(data, sizeof(data));
	send_all(fd, data, sizeof(data), 0, sizeof(data));
	control_expect("RECEIVED");
	wait_sent(fd);
	close(fd);
}

static void unsent_server(void)
{
	unsigned char data[PEEKED];
	int fd = vsock_accepted(SOCK_STREAM);

	receive_all(fd, data, sizeof(data), 0, sizeof(data));
	control_put("RECEIVED");
	close(fd);
}

static void accept_queue_client(void)
{
	uint64_t end = now_ns() + STRESS_NS;

	do {
		control_put("%d", GOES_ON);
		control_expect("LISTENING");
		int fd = vsock_socket(SOCK_STREAM);
		vsock_connect_to(fd, options.peer_cid, options.peer_port);
		close(fd);
	} while (now_ns() < end);
	control_put("%d", IS_DONE);
}

static void accept_queue_server(void)
{
	while (control_number() == GOES_ON) {
		int fd = vsock_listening(options.peer_port, SOCK_STREAM);
		control_put("LISTENING");
		close(fd);
	}
}

/* A transport is taken from a socket that has no port: as many ports as the kernel tries are taken before. */
static void transport_release_client(void)
{
	enum { TRIES = 24 };

	for (unsigned int cid = VMADDR_CID_HYPERVISOR; cid <= VMADDR_CID_HOST + 1; cid++) {
		struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = VMADDR_PORT_ANY};
		socklen_t size = sizeof(address);
		int taken[TRIES], first = vsock_socket(SOCK_STREAM);

		if (bind(first, (struct sockaddr *)&address, sizeof(address))) {
			if (errno != EADDRNOTAVAIL)
				fail_errno("bind");
			close(first);
			continue;
		}
		if (getsockname(first, (struct sockaddr *)&address, &size))
			fail_errno("getsockname");
		for (int at = 0; at < TRIES; at++) {
			taken[at] = vsock_socket(SOCK_STREAM);
			address.svm_port++;
			if (bind(taken[at], (struct sockaddr *)&address, sizeof(address)))
				fail_errno("bind");
		}
		close(first);
		int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);
		for (unsigned int other = VMADDR_CID_HYPERVISOR; other <= VMADDR_CID_HOST + 1; other++) {
			address.svm_cid = other;
			connect(fd, (struct sockaddr *)&address, sizeof(address));
		}
		close(fd);
		for (int at = 0; at < TRIES; at++)
			close(taken[at]);
	}
}

static void retry_client(void)
{
	int fd = vsock_socket(SOCK_STREAM);

	if (!vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail("connect: a connection, expected none");
	control_put("LISTEN");
	control_expect("LISTENING");
	if (vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail_errno("connect, the second time");
	close(fd);
}

static void waits_for_close(int fd)
{
	wait_remote_close(fd);
	close(fd);
}

static void retry_server(void)
{
	control_expect("LISTEN");
	waits_for_close(vsock_accepted(SOCK_STREAM));
}

static void linger_client(void)
{
	int fd = vsock_connected(SOCK_STREAM);

	set_linger(fd, 1);
	close(fd);
}

static void linger_server(void)
{
	waits_for_close(vsock_accepted(SOCK_STREAM));
}

static void linger_unread_client(void)
{
	int fd = vsock_connected(SOCK_STREAM);

	set_linger(fd, LINGER_S);
	send_byte(fd, 1);
	wait_sent(fd);
	uint64_t before = now_ns();
	close(fd);
	if (now_ns() - before >= LINGER_S * 1000000000ull)
		fail("close() waits for what nobody reads");
	control_put("DONE");
}

static void linger_unread_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	control_expect("DONE");
	close(fd);
}

static void on_user(int number)
{
	(void)number;
}

static volatile bool signals_end;

static void *sends_signals(void *main_thread)
{
	while (!signals_end) {
		pthread_kill(*(pthread_t *)main_thread, SIGUSR1);
		usleep(200);
	}
	return NULL;
}

/* Connects are cut off by signals, and then made with another transport. */
static void transport_change_client(void)
{
	pthread_t self = pthread_self(), thread;
	struct sigaction action = {.sa_handler = on_user};

	sigaction(SIGUSR1, &action, NULL);
	if (pthread_create(&thread, NULL, sends_signals, &self))
		fail("no thread");
	control_expect("LISTENING");
	uint64_t end = now_ns() + STRESS_NS;
	do {
		struct sockaddr_vm address = {
			.svm_family = AF_VSOCK, .svm_cid = options.peer_cid, .svm_port = options.peer_port};
		int fd = vsock_socket(SOCK_STREAM);

		if (connect(fd, (struct sockaddr *)&address, sizeof(address)) && errno != EINTR && errno != ECONNRESET)
			fail_errno("connect");
		address.svm_cid = VMADDR_CID_HYPERVISOR;
		connect(fd, (struct sockaddr *)&address, sizeof(address));
		close(fd);
		control_put("%d", GOES_ON);
	} while (now_ns() < end);
	signals_end = true;
	pthread_join(thread, NULL);
	control_put("%d", IS_DONE);
}

static void transport_change_server(void)
{
	int listener = vsock_listening(options.peer_port, SOCK_STREAM);

	if (fcntl(listener, F_SETFL, O_NONBLOCK))
		fail_errno("fcntl");
	control_put("LISTENING");
	while (control_number() == GOES_ON) {
		int fd;

		while ((fd = accept(listener, NULL, NULL)) >= 0)
			close(fd);
		if (errno != EAGAIN)
			fail_errno("accept");
	}
	close(listener);
}

const struct test_case stream_cases[] = {
	{"SOCK_STREAM connection reset", connection_reset_client, NULL},
	{"SOCK_STREAM bind only", bind_only_client, bind_only_server},
	{"SOCK_STREAM client close", client_close_client, client_close_server},
	{"SOCK_STREAM server close", server_close_client, server_close_server},
	{"SOCK_STREAM multiple connections", connections_client, connections_server},
	{"SOCK_STREAM MSG_PEEK", peek_client, peek_server},
	{"SOCK_STREAM poll() + SO_RCVLOWAT", low_water_client, low_water_server},
	{"SOCK_STREAM test invalid buffer", invalid_client, invalid_server, lacks_stream_efault},
	{"SOCK_STREAM virtio skb merge", merge_client, merge_server},
	{"SOCK_STREAM SHUT_WR", shut_wr_client, shut_wr_server, lacks_sigpipe},
	{"SOCK_STREAM SHUT_RD", shut_rd_client, shut_rd_server, lacks_sigpipe},
	{"SOCK_STREAM double bind connect", double_bind_client, double_bind_server},
	{"SOCK_STREAM virtio credit update + SO_RCVLOWAT", credit_client, credit_rcvlowat_server,
	 lacks_news_of_room},
	{"SOCK_STREAM virtio credit update + low rx_bytes", credit_client, credit_low_bytes_server},
	{"SOCK_STREAM ioctl(SIOCOUTQ) 0 unsent bytes", unsent_client, unsent_server, lacks_siocoutq},
	{"SOCK_STREAM leak accept queue", accept_queue_client, accept_queue_server},
	{"SOCK_STREAM transport release use-after-free", transport_release_client, NULL},
	{"SOCK_STREAM retry failed connect()", retry_client, retry_server},
	{"SOCK_STREAM SO_LINGER null-ptr-deref", linger_client, linger_server},
	{"SOCK_STREAM SO_LINGER close() on unread", linger_unread_client, linger_unread_server,
	 lacks_end_of_linger},
	{"SOCK_STREAM transport change null-ptr-deref", transport_change_client, transport_change_server},
	{NULL, NULL, NULL},
};
