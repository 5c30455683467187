/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's half of `softkvm vsock-test`: what its parts have in common. */
#ifndef VSOCK_TEST_H
#define VSOCK_TEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <linux/vm_sockets.h>

enum mode { CLIENT, SERVER };

/* What the command line says. */
struct options {
	enum mode mode;
	unsigned int peer_cid;
	unsigned int peer_port;
	/* What a peer's transport can not do. */
	bool no_read_after_close;
	/* The kernel's own vsock_test is a half in this guest. */
	bool kernels_program;
};

extern struct options options;

/* Either half of a case; NULL where that half has nothing to do. */
typedef void half(void);

struct test_case {
	const char *name;
	half *client;
	half *server;
	/* Returns why this guest's kernel can not do the half of MODE; NULL if it can. */
	const char *(*lacks)(enum mode mode);
};

extern const struct test_case stream_cases[];
extern const struct test_case seqpacket_cases[];
extern const struct test_case zerocopy_cases[];
extern const struct test_case more_cases[];

/* In the order of the kernel's own list, then ours; ends with a case without a name. */
const struct test_case *find_case(const char *name);
/* Whether the cases of this run have one of that name. */
bool listed(const char *name);

/* Ends the program: the case that runs has failed. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same, with what errno says. */
_Noreturn void fail_errno(const char *what);

/* -- control.c: lines to the other half, over a connection of its own */
void control_open_vsock(unsigned int port);
void control_open_tcp(const char *host, const char *port, bool listen);
void control_put(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Returns the next line, without its end, until the next call. */
const char *control_get(void);
void control_expect(const char *line);
unsigned long control_number(void);
/* Tells the other half that all is done, and waits for it. */
void control_complete(void);
/* Lets FD be the control connection. */
void control_use(int fd);
/* Tells the other half what cases there are, and behind a tab why this guest's kernel cannot do one. */
void describe(void);

/* -- sockets.c */
int vsock_socket(int type);
/* Returns 0, or -1 with errno. */
int vsock_connect_to(int fd, unsigned int cid, unsigned int port);
int vsock_bound(unsigned int port, int type);
int vsock_listening(unsigned int port, int type);
/* Connects when the other half listens. */
int vsock_connected(int type);
/* Listens, says so, and takes the first connection. */
int vsock_accepted(int type);
int accept_one(int listener);
/* Sends or receives SIZE bytes and looks whether that comes to EXPECTED: bytes, or an errno below 0. */
void send_all(int fd, const void *data, size_t size, int flags, ssize_t expected);
void receive_all(int fd, void *data, size_t size, int flags, ssize_t expected);
void send_byte(int fd, ssize_t expected);
void receive_byte(int fd, ssize_t expected);
void wait_remote_close(int fd);
/* Waits until the peer has taken all that was sent; false if the kernel can not tell. */
bool wait_sent(int fd);
void set_u64(int fd, int option, uint64_t value);
void set_int(int fd, int option, int value);
void set_linger(int fd, int seconds);
uint64_t now_ns(void);
unsigned long hash_djb2(const void *data, size_t size);
void *allocate(size_t size);
void fill_random(void *data, size_t size);

/* Two sockets that are connected on this guest's loopback; false if it has none. */
bool loopback_pair(int type, int fds[2]);

/* -- relay.c: carries lines between a TCP connection of this guest's and the host's vsock port */
int relay(unsigned int host_port, const char *tcp_port, bool listen, bool describes);

/* -- what kernels lack */
const char *lacks_zerocopy(enum mode mode);
const char *lacks_siocoutq(enum mode mode);
const char *lacks_sigpipe(enum mode mode);
const char *lacks_stream_efault(enum mode mode);

#endif
