/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of our own. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vsock_test.h"

#define BULK (1 << 20)
#define CANCELLED 50

/* One half sends no more, and still gets what the other answers. */
static void speaks_last(int fd)
{
	send_all(fd, "question", 8, 0, 8);
	if (shutdown(fd, SHUT_WR))
		fail_errno("shutdown");
	char answer[16];
	receive_all(fd, answer, sizeof(answer), 0, 6);
	if (memcmp(answer, "answer", 6))
		fail("another answer");
	close(fd);
}

static void answers(int fd)
{
	char question[16];

	receive_all(fd, question, sizeof(question), 0, 8);
	send_all(fd, "answer", 6, 0, 6);
	close(fd);
}

static void half_client_client(void)
{
	speaks_last(vsock_connected(SOCK_STREAM));
}

static void half_client_server(void)
{
	answers(vsock_accepted(SOCK_STREAM));
}

static void half_server_client(void)
{
	answers(vsock_connected(SOCK_STREAM));
}

static void half_server_server(void)
{
	speaks_last(vsock_accepted(SOCK_STREAM));
}

static void both_close(int fd)
{
	control_put("READY");
	control_expect("READY");
	close(fd);
}

static void both_close_client(void)
{
	both_close(vsock_connected(SOCK_STREAM));
}

static void both_close_server(void)
{
	both_close(vsock_accepted(SOCK_STREAM));
}

/* Messages of no bytes are messages; Linux sends none of them, so that the bounds of others stay is what is seen. */
static void empty_client(void)
{
	int fd = vsock_connected(SOCK_SEQPACKET);

	send_all(fd, "one", 3, 0, 3);
	ssize_t size = send(fd, "", 0, MSG_NOSIGNAL);
	if (size)
		fail("send of no bytes: %zd", size);
	send_all(fd, "two", 3, 0, 3);
	control_put("SENDDONE");
	control_expect("DONE");
	close(fd);
}

static void empty_server(void)
{
	char data[16];
	int fd = vsock_accepted(SOCK_SEQPACKET);

	control_expect("SENDDONE");
	ssize_t size = recv(fd, data, sizeof(data), 0);
	if (size != 3 || memcmp(data, "one", 3))
		fail("recv: %zd", size);
	size = recv(fd, data, sizeof(data), 0);
	if (!size)
		size = recv(fd, data, sizeof(data), 0);
	if (size != 3 || memcmp(data, "two", 3))
		fail("recv: %zd", size);
	control_put("DONE");
	close(fd);
}

/* The receiver goes while the sender waits for room. */
static void reset_client(void)
{
	size_t size = 4 << 20;
	int fd = vsock_connected(SOCK_STREAM);
	char *data = allocate(size);
	size_t done = 0;
	ssize_t sent;

	memset(data, 'A', size);
	while ((sent = send(fd, data, size - done, MSG_NOSIGNAL)) > 0 && done < size)
		done += sent;
	if (sent >= 0 || (errno != EPIPE && errno != ECONNRESET))
		fail("send: %zd behind %zu bytes, expected EPIPE", sent, done);
	free(data);
	close(fd);
}

static void reset_server(void)
{
	char data[1000];
	int fd = vsock_accepted(SOCK_STREAM);

	receive_all(fd, data, sizeof(data), 0, sizeof(data));
	close(fd);
}

/* Connects that are given up at once; one that is not works behind them. */
static void cancel_client(void)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = options.peer_cid, .svm_port = options.peer_port};

	control_expect("LISTENING");
	for (int at = 0; at < CANCELLED; at++) {
		int fd = vsock_socket(SOCK_STREAM | SOCK_NONBLOCK);

		if (connect(fd, (struct sockaddr *)&address, sizeof(address)) && errno != EINPROGRESS)
			fail_errno("connect");
		close(fd);
	}
	int fd = vsock_socket(SOCK_STREAM);
	if (vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail_errno("connect");
	send_byte(fd, 1);
	control_expect("DONE");
	close(fd);
}

/* Takes connections until one has a byte: those that were given up have none. */
static void cancel_server(void)
{
	int listener = vsock_listening(options.peer_port, SOCK_STREAM);
	ssize_t size;

	control_put("LISTENING");
	do {
		char byte;
		int fd = accept_one(listener);
		size = recv(fd, &byte, 1, 0);
		if (size == 1)
			control_put("DONE");
		close(fd);
	} while (size != 1);
	close(listener);
}

static void sends_and_receives(int fd)
{
	char *out = allocate(BULK), *in = allocate(BULK);
	size_t sent = 0, received = 0;

	fill_random(out, BULK);
	while (sent < BULK || received < BULK) {
		struct pollfd poller = {.fd = fd};

		poller.events = (sent < BULK ? POLLOUT : 0) | (received < BULK ? POLLIN : 0);
		if (poll(&poller, 1, -1) < 0)
			fail_errno("poll");
		if (poller.revents & POLLOUT) {
			ssize_t size = send(fd, out + sent, BULK - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (size < 0 && errno != EAGAIN)
				fail_errno("send");
			sent += size > 0 ? size : 0;
		}
		if (poller.revents & POLLIN) {
			ssize_t size = recv(fd, in + received, BULK - received, MSG_DONTWAIT);
			if (size < 0 && errno != EAGAIN)
				fail_errno("recv");
			if (!size)
				fail("the end behind %zu bytes", received);
			received += size > 0 ? size : 0;
		}
	}
	control_put("%lu", hash_djb2(out, BULK));
	if (control_number() != hash_djb2(in, BULK))
		fail("other bytes than were sent");
	free(out);
	free(in);
	close(fd);
}

static void bulk_client(void)
{
	sends_and_receives(vsock_connected(SOCK_STREAM));
}

static void bulk_server(void)
{
	sends_and_receives(vsock_accepted(SOCK_STREAM));
}

/* Sockets of the other type don't find each other. */
static void type_client(void)
{
	control_expect("LISTENING");
	int fd = vsock_socket(SOCK_SEQPACKET);
	if (!vsock_connect_to(fd, options.peer_cid, options.peer_port))
		fail("connect: a connection, expected none");
	if (errno != ECONNRESET)
		fail_errno("connect, expected a reset");
	control_put("DONE");
	close(fd);
}

static void type_server(void)
{
	int listener = vsock_listening(options.peer_port, SOCK_STREAM);

	control_put("LISTENING");
	control_expect("DONE");
	close(listener);
}

const struct test_case more_cases[] = {
	{"SOCK_STREAM half-closed by the client", half_client_client, half_client_server},
	{"SOCK_STREAM half-closed by the server", half_server_client, half_server_server},
	{"SOCK_STREAM closed by both at once", both_close_client, both_close_server},
	{"SOCK_STREAM reset while sending", reset_client, reset_server},
	{"SOCK_STREAM cancelled connect()", cancel_client, cancel_server},
	{"SOCK_STREAM 1 MiB both ways", bulk_client, bulk_server},
	{"SOCK_SEQPACKET zero-length message", empty_client, empty_server},
	{"SOCK_SEQPACKET connect() to a stream", type_client, type_server},
	{NULL, NULL, NULL},
};
