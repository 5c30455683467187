/* SPDX-License-Identifier: Apache-2.0 */
/* MSG_ZEROCOPY: the sender's memory is sent, and the kernel tells on the error queue when it is done with it. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <linux/errqueue.h>

#include "vsock_test.h"

#ifndef SOL_VSOCK
#define SOL_VSOCK 287
#endif
#define VSOCK_RECVERR 1

#define PAGE 4096ul
#define VECTORS 3
#define COMPLETION_MS 1000

struct part {
	size_t size;
	/* Where in its first page it begins. */
	size_t offset;
	bool unmapped;
};

struct transfer {
	struct part parts[VECTORS];
	int error;
	bool enabled;
	/* Whether the kernel must not have copied. */
	bool zerocopied;
	bool stream_only;
};

static const struct transfer transfers[] = {
	{{{PAGE}, {PAGE}, {200}}, 0, true, true},
	{{{PAGE}, {2 * PAGE}, {3 * PAGE}}, 0, true, true},
	{{{16 * PAGE}, {16 * PAGE}, {16 * PAGE}}, 0, true, true},
	{{{PAGE}, {100, 1}, {PAGE}}, 0, true, true},
	{{{PAGE}, {PAGE, 0, true}, {PAGE}}, ENOMEM, true, false},
	{{{PAGE}}, 0, false, false},
	{{{100 * PAGE}}, 0, true, false, true},
};
#define TRANSFERS (sizeof(transfers) / sizeof(*transfers))

static size_t whole_size(const struct transfer *transfer)
{
	size_t size = 0;

	for (int at = 0; at < VECTORS; at++)
		size += transfer->parts[at].size;
	return size;
}

static void enable(int fd)
{
	set_int(fd, SO_ZEROCOPY, 1);
}

const char *lacks_zerocopy(enum mode mode)
{
	int one = 1, fd = vsock_socket(SOCK_STREAM);
	bool lacks = mode == CLIENT && setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one));

	close(fd);
	return lacks ? "no MSG_ZEROCOPY in this kernel's AF_VSOCK" : NULL;
}

static void check_completion(int fd, bool zerocopied)
{
	char control[128];
	struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};

	if (recvmsg(fd, &message, MSG_ERRQUEUE) < 0)
		fail_errno("recvmsg of the error queue");
	struct cmsghdr *first = CMSG_FIRSTHDR(&message);
	if (!first || first->cmsg_level != SOL_VSOCK || first->cmsg_type != VSOCK_RECVERR)
		fail("the error queue has something else");
	struct sock_extended_err *error = (void *)CMSG_DATA(first);
	if (error->ee_origin != SO_EE_ORIGIN_ZEROCOPY || error->ee_errno)
		fail("completion: origin %u, errno %u", error->ee_origin, error->ee_errno);
	if (zerocopied == !!(error->ee_code & SO_EE_CODE_ZEROCOPY_COPIED))
		fail("the kernel has %s", zerocopied ? "copied" : "not copied");
}

static void client_transfer(const struct transfer *transfer, int type)
{
	struct iovec vectors[VECTORS];
	struct msghdr message = {.msg_iov = vectors};
	int fd = vsock_connected(type);
	size_t size = whole_size(transfer), at = 0;
	char *copy = allocate(size);

	if (transfer->enabled)
		enable(fd);
	for (; message.msg_iovlen < VECTORS && transfer->parts[message.msg_iovlen].size; message.msg_iovlen++) {
		const struct part *part = &transfer->parts[message.msg_iovlen];
		struct iovec *vector = &vectors[message.msg_iovlen];
		char *base = mmap(NULL, part->offset + part->size, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

		if (base == MAP_FAILED)
			fail_errno("mmap");
		vector->iov_base = base + part->offset;
		vector->iov_len = part->size;
		fill_random(vector->iov_base, part->size);
		memcpy(copy + at, vector->iov_base, part->size);
		at += part->size;
	}
	/* Behind all others, of which one would lie there. */
	for (size_t number = 0; number < message.msg_iovlen; number++)
		if (transfer->parts[number].unmapped)
			munmap(vectors[number].iov_base, vectors[number].iov_len);
	ssize_t sent = sendmsg(fd, &message, MSG_ZEROCOPY | MSG_NOSIGNAL);
	if (transfer->error ? sent != -1 || errno != transfer->error : sent != (ssize_t)size)
		fail("sendmsg: %zd, %s", sent, strerror(errno));
	struct pollfd poller = {.fd = fd};
	if (poll(&poller, 1, transfer->enabled && !transfer->error ? COMPLETION_MS * 30 : 100) < 0)
		fail_errno("poll");
	if (poller.revents & POLLERR)
		check_completion(fd, transfer->zerocopied);
	else if (transfer->enabled && !transfer->error)
		fail("no completion on the error queue");
	control_put("%lu", transfer->error ? 0 : hash_djb2(copy, size));
	control_put("DONE");
	for (size_t number = 0; number < message.msg_iovlen; number++)
		if (!transfer->parts[number].unmapped)
			munmap((char *)vectors[number].iov_base - transfer->parts[number].offset,
			       transfer->parts[number].offset + transfer->parts[number].size);
	free(copy);
	close(fd);
}

static void server_transfer(const struct transfer *transfer, int type)
{
	size_t size = whole_size(transfer), done = 0;
	char *data = allocate(size);
	int fd = vsock_accepted(type);
	ssize_t more;

	while (done < size && (more = read(fd, data + done, size - done)) > 0)
		done += more;
	unsigned long hash = control_number();
	if (hash != (transfer->error ? 0 : hash_djb2(data, size)))
		fail("other bytes than were sent");
	control_expect("DONE");
	free(data);
	close(fd);
}

static void each(void (*half)(const struct transfer *, int), int type)
{
	for (size_t at = 0; at < TRANSFERS; at++)
		if (type == SOCK_STREAM || !transfers[at].stream_only)
			half(&transfers[at], type);
}

static void stream_client(void)
{
	each(client_transfer, SOCK_STREAM);
}

static void stream_server(void)
{
	each(server_transfer, SOCK_STREAM);
}

static void seqpacket_client(void)
{
	each(client_transfer, SOCK_SEQPACKET);
}

static void seqpacket_server(void)
{
	each(server_transfer, SOCK_SEQPACKET);
}

static void empty_client(void)
{
	char control[128];
	struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};
	int fd = vsock_connected(SOCK_STREAM);

	if (recvmsg(fd, &message, MSG_ERRQUEUE) != -1)
		fail("recvmsg: something on the error queue");
	control_put("DONE");
	close(fd);
}

static void empty_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	control_expect("DONE");
	close(fd);
}

static void leak_client(void)
{
	struct pollfd poller = {.events = 0};
	int fd = vsock_connected(SOCK_STREAM);

	enable(fd);
	send_all(fd, "A", 1, MSG_ZEROCOPY, 1);
	poller.fd = fd;
	if (poll(&poller, 1, -1) < 0)
		fail_errno("poll");
	close(fd); /* with the completion unread */
}

static void leak_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	receive_byte(fd, 1);
	wait_remote_close(fd);
	close(fd);
}

/* The kernel has no memory for the completion: control data takes all that a socket may have. */
static void no_memory_client(void)
{
	size_t most = 0;
	FILE *file = fopen("/proc/sys/net/core/optmem_max", "r");

	if (!file || fscanf(file, "%zu", &most) != 1)
		fail_errno("optmem_max");
	fclose(file);
	int fd = vsock_connected(SOCK_STREAM);
	enable(fd);
	char *control = allocate(CMSG_SPACE(most - 1)), byte = 0;
	memset(control, 0, CMSG_SPACE(most - 1));
	struct iovec vector = {.iov_base = &byte, .iov_len = 1};
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = most - 1};
	if (sendmsg(fd, &message, MSG_ZEROCOPY) >= 0 || errno != ENOMEM)
		fail_errno("sendmsg, expected ENOMEM");
	free(control);
	close(fd);
}

static void no_memory_server(void)
{
	int fd = vsock_accepted(SOCK_STREAM);

	wait_remote_close(fd);
	close(fd);
}

const struct test_case zerocopy_cases[] = {
	{"SOCK_STREAM MSG_ZEROCOPY", stream_client, stream_server, lacks_zerocopy},
	{"SOCK_SEQPACKET MSG_ZEROCOPY", seqpacket_client, seqpacket_server, lacks_zerocopy},
	{"SOCK_STREAM MSG_ZEROCOPY empty MSG_ERRQUEUE", empty_client, empty_server},
	{"SOCK_STREAM MSG_ZEROCOPY leak MSG_ERRQUEUE", leak_client, leak_server, lacks_zerocopy},
	{"SOCK_STREAM MSG_ZEROCOPY leak completion skb", no_memory_client, no_memory_server, lacks_zerocopy},
	{NULL, NULL, NULL},
};
