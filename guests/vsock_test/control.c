/* SPDX-License-Identifier: Apache-2.0 */
/* Lines to the other half. Both wait for each other's between two cases: neither sees anything of the other's last. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vsock_test.h"

#define LINE_MAX_BYTES 512

static int control = -1;
static char received[4096];
static size_t received_size;

void control_open_vsock(unsigned int port)
{
	control = vsock_socket(SOCK_STREAM);
	if (vsock_connect_to(control, VMADDR_CID_HOST, port))
		fail_errno("control connection");
}

void control_open_tcp(const char *host, const char *port, bool listening)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	int one = 1;

	if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
		fail("control host %s: expected an IPv4 address", host);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0)
		fail_errno("control socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listening) {
		if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1))
			fail_errno("control address");
		control = accept_one(fd);
		close(fd);
	} else {
		/* The other half may not listen yet. */
		for (int tries = 0; connect(fd, (struct sockaddr *)&address, sizeof(address)); tries++) {
			if (tries == 500)
				fail_errno("control connection");
			usleep(20000);
		}
		control = fd;
	}
}

void control_put(const char *format, ...)
{
	char line[LINE_MAX_BYTES];
	va_list arguments;

	va_start(arguments, format);
	int size = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	if (size < 0 || size >= (int)sizeof(line) - 1)
		fail("a control line of %d bytes", size);
	line[size++] = '\n';
	for (int done = 0; done < size;) {
		ssize_t sent = send(control, line + done, size - done, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			fail_errno("control connection");
		done += sent;
	}
}

const char *control_get(void)
{
	static char line[LINE_MAX_BYTES];

	for (;;) {
		char *end = memchr(received, '\n', received_size);
		if (end) {
			size_t size = end - received;
			if (size >= sizeof(line))
				fail("a control line of %zu bytes", size);
			memcpy(line, received, size);
			line[size] = 0;
			received_size -= size + 1;
			memmove(received, end + 1, received_size);
			return line;
		}
		if (received_size == sizeof(received))
			fail("a control line without an end");
		ssize_t more = recv(control, received + received_size, sizeof(received) - received_size, 0);
		if (more < 0 && errno == EINTR)
			continue;
		if (more < 0)
			fail_errno("control connection");
		if (!more)
			fail("the other half is gone");
		received_size += more;
	}
}

void control_expect(const char *expected)
{
	const char *line = control_get();

	if (strcmp(line, expected))
		fail("the other half says \"%s\", expected \"%s\"", line, expected);
}

unsigned long control_number(void)
{
	return strtoul(control_get(), NULL, 10);
}

void control_complete(void)
{
	static const char word[] = "COMPLETED\n";

	/* Kernels before 6.9 say nothing at the end: their half may be gone. */
	if (send(control, word, sizeof(word) - 1, MSG_NOSIGNAL) == sizeof(word) - 1)
		while (recv(control, received, sizeof(received), 0) > 0 && !memchr(received, '\n', sizeof(received)))
			;
	close(control);
}

void control_use(int fd)
{
	control = fd;
}
