/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel's own vsock_test speaks to its other half by TCP, of which a machine needs none: what it says to this
 * guest's loopback goes to the host by vsock, and back. */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vsock_test.h"

static int tcp_end(const char *port, bool listening)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(atoi(port)),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0)
		fail_errno("TCP socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listening) {
		if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1))
			fail_errno("TCP address");
		int accepted = accept_one(fd);
		close(fd);
		return accepted;
	}
	for (int tries = 0; connect(fd, (struct sockaddr *)&address, sizeof(address)); tries++) {
		if (tries == 500)
			fail_errno("TCP connection");
		usleep(20000);
	}
	return fd;
}

/* Moves what has come from one to the other; false at the end. */
static bool move(int from, int to)
{
	char data[4096];
	ssize_t size = recv(from, data, sizeof(data), 0);

	if (size <= 0)
		return false;
	for (ssize_t done = 0; done < size;) {
		ssize_t sent = send(to, data + done, size - done, MSG_NOSIGNAL);
		if (sent <= 0)
			return false;
		done += sent;
	}
	return true;
}

int relay(unsigned int host_port, const char *tcp_port, bool listening, bool describes)
{
	int tcp = tcp_end(tcp_port, listening);
	int host = vsock_socket(SOCK_STREAM);

	if (vsock_connect_to(host, VMADDR_CID_HOST, host_port))
		fail_errno("connection to the host");
	if (describes) {
		control_use(host);
		describe();
	}
	struct pollfd ends[2] = {{.fd = tcp, .events = POLLIN}, {.fd = host, .events = POLLIN}};
	for (;;) {
		if (poll(ends, 2, -1) < 0 && errno != EINTR)
			fail_errno("poll");
		if (ends[0].revents && !move(tcp, host))
			break;
		if (ends[1].revents && !move(host, tcp))
			break;
	}
	return 0;
}
