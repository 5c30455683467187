/* SPDX-License-Identifier: Apache-2.0 */
/* The guest's half of `softkvm vsock-test`. It speaks the protocol of the kernel's tools/testing/vsock, so that the
 * kernel's own vsock_test can be its other half. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "vsock_test.h"

#define CASES_MAX 128
#define PORT 1234
/* A case that takes longer has hung. */
#define CASE_S 120

struct options options = {.peer_cid = VMADDR_CID_HOST, .peer_port = PORT};

/* The kernel's, in its order (Linux 6.16), then ours. */
static const char *const order[] = {
	"SOCK_STREAM connection reset",
	"SOCK_STREAM bind only",
	"SOCK_STREAM client close",
	"SOCK_STREAM server close",
	"SOCK_STREAM multiple connections",
	"SOCK_STREAM MSG_PEEK",
	"SOCK_SEQPACKET msg bounds",
	"SOCK_SEQPACKET MSG_TRUNC flag",
	"SOCK_SEQPACKET timeout",
	"SOCK_SEQPACKET invalid receive buffer",
	"SOCK_STREAM poll() + SO_RCVLOWAT",
	"SOCK_SEQPACKET big message",
	"SOCK_STREAM test invalid buffer",
	"SOCK_SEQPACKET test invalid buffer",
	"SOCK_STREAM virtio skb merge",
	"SOCK_SEQPACKET MSG_PEEK",
	"SOCK_STREAM SHUT_WR",
	"SOCK_STREAM SHUT_RD",
	"SOCK_STREAM MSG_ZEROCOPY",
	"SOCK_SEQPACKET MSG_ZEROCOPY",
	"SOCK_STREAM MSG_ZEROCOPY empty MSG_ERRQUEUE",
	"SOCK_STREAM double bind connect",
	"SOCK_STREAM virtio credit update + SO_RCVLOWAT",
	"SOCK_STREAM virtio credit update + low rx_bytes",
	"SOCK_STREAM ioctl(SIOCOUTQ) 0 unsent bytes",
	"SOCK_SEQPACKET ioctl(SIOCOUTQ) 0 unsent bytes",
	"SOCK_STREAM leak accept queue",
	"SOCK_STREAM MSG_ZEROCOPY leak MSG_ERRQUEUE",
	"SOCK_STREAM MSG_ZEROCOPY leak completion skb",
	"SOCK_STREAM transport release use-after-free",
	"SOCK_STREAM retry failed connect()",
	"SOCK_STREAM SO_LINGER null-ptr-deref",
	"SOCK_STREAM SO_LINGER close() on unread",
	"SOCK_STREAM transport change null-ptr-deref",
	"SOCK_STREAM half-closed by the client",
	"SOCK_STREAM half-closed by the server",
	"SOCK_STREAM closed by both at once",
	"SOCK_STREAM reset while sending",
	"SOCK_STREAM cancelled connect()",
	"SOCK_STREAM 1 MiB both ways",
	"SOCK_SEQPACKET zero-length message",
	"SOCK_SEQPACKET connect() to a stream",
};

static const struct test_case *const tables[] = {stream_cases, seqpacket_cases, zerocopy_cases, more_cases};
static const char *running = "vsock_test";

_Noreturn void fail(const char *format, ...)
{
	va_list arguments;

	fflush(stdout);
	fprintf(stderr, "%s: ", running);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(EXIT_FAILURE);
}

_Noreturn void fail_errno(const char *what)
{
	fail("%s: %s", what, strerror(errno));
}

const struct test_case *find_case(const char *name)
{
	for (size_t table = 0; table < sizeof(tables) / sizeof(*tables); table++)
		for (const struct test_case *found = tables[table]; found->name; found++)
			if (!strcmp(found->name, name))
				return found;
	return NULL;
}

static const struct test_case *cases[CASES_MAX];
static bool skipped[CASES_MAX];
static int case_count;

bool listed(const char *name)
{
	for (int at = 0; at < case_count; at++)
		if (!strcmp(cases[at]->name, name))
			return true;
	return false;
}

static void add_case(const char *name)
{
	/* A name that only the peer knows is a case that we skip. */
	static struct test_case unknown[CASES_MAX];
	const struct test_case *found = find_case(name);

	if (case_count == CASES_MAX)
		fail("more than %d cases", CASES_MAX);
	if (!found) {
		unknown[case_count].name = strdup(name);
		skipped[case_count] = true;
		found = &unknown[case_count];
	}
	cases[case_count++] = found;
}

/* Takes the cases of a list as `vsock_test --list` prints it. */
static void order_like(const char *path)
{
	char line[256];
	FILE *file = fopen(path, "r");

	if (!file)
		fail_errno(path);
	case_count = 0;
	options.kernels_program = true;
	while (fgets(line, sizeof(line), file)) {
		char *name = strchr(line, '\t');

		line[strcspn(line, "\n")] = 0;
		if (name && line[0] >= '0' && line[0] <= '9')
			add_case(name + 1);
	}
	fclose(file);
}

static int case_number(const char *text)
{
	char *end;
	long number = strtol(text, &end, 10);

	if (!*text || *end || number < 0 || number >= case_count)
		fail("case %s: expected a number from 0 to %d", text, case_count - 1);
	return number;
}

static void list_cases(void)
{
	printf("ID\tTest name\n");
	for (int at = 0; at < case_count; at++)
		printf("%d\t%s\n", at, cases[at]->name);
}

static const char *lacks(const struct test_case *which)
{
	const char *reason = which->lacks ? which->lacks(options.mode) : NULL;

	/* With both halves in this guest its kernel does the other's as well. */
	if (!reason && which->lacks && options.peer_cid == VMADDR_CID_LOCAL)
		reason = which->lacks(options.mode == CLIENT ? SERVER : CLIENT);
	return reason;
}

void describe(void)
{
	control_put("CASES %d", case_count);
	for (int at = 0; at < case_count; at++) {
		const char *reason = lacks(cases[at]);

		control_put("%s%s%s", cases[at]->name, reason ? "\t" : "", reason ? reason : "");
	}
}

/* Tells the host how a program ended and what it has printed; returns 0 if it is to run again, else 1. */
static int tell(const char *status, const char *path)
{
	char line[256];

	control_put("EXIT %s", status);
	FILE *file = path ? fopen(path, "r") : NULL;
	while (file && fgets(line, sizeof(line), file)) {
		line[strcspn(line, "\n")] = 0;
		control_put("| %s", line);
	}
	control_put("END");
	return strcmp(control_get(), "AGAIN") ? 1 : 0;
}

static void run_case(int at)
{
	const struct test_case *now = cases[at];

	running = now->name;
	bool skip = skipped[at] || lacks(now);
	/* The barrier: neither begins before the other has ended the last case, whose port is this one's as well. */
	control_put(skip ? "SKIP" : "NEXT");
	const char *other = control_get();
	if (skip || !strncmp(other, "SKIP", 4)) {
		printf("%d - %s...skipped\n", at, now->name);
		return;
	}
	if (strcmp(other, "NEXT"))
		fail("the other half says \"%s\", expected NEXT or SKIP", other);
	half *run = options.mode == CLIENT ? now->client : now->server;
	alarm(CASE_S);
	if (run)
		run();
	alarm(0);
	printf("%d - %s...ok\n", at, now->name);
}

static void on_alarm(int number)
{
	(void)number;
	static const char text[] = ": it hangs\n";

	if (write(STDERR_FILENO, running, strlen(running)) < 0 || write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
		_exit(EXIT_FAILURE);
	_exit(EXIT_FAILURE);
}

static unsigned int local_cid(void)
{
	unsigned int cid;
	int fd = open("/dev/vsock", O_RDONLY);

	if (fd < 0)
		fail_errno("/dev/vsock");
	if (ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid))
		fail_errno("the local context ID");
	close(fd);
	return cid;
}

static unsigned int number_of(const char *text, const char *what)
{
	char *end;
	unsigned long number = strtoul(text, &end, 10);

	if (!*text || *end || number > 0xffffffff)
		fail("%s %s: expected a number", what, text);
	return number;
}

static const char usage[] =
	"usage: vsock_test --mode client|server --control-port PORT [--control-host HOST] [--peer-cid CID]\n"
	"       vsock_test --mode client|server --control-vsock PORT    the control connection goes to the host by vsock\n"
	"       vsock_test --relay connect|listen --control-port PORT --control-vsock PORT\n"
	"                                      carry the kernel's vsock_test's control connection to the host\n"
	"       vsock_test --tell STATUS [--log FILE] --control-vsock PORT\n"
	"                                      tell the host how a program ended; status 0: it is to run again\n"
	"       vsock_test --local-cid         print this machine's context ID\n"
	"       vsock_test --list              print the cases\n"
	"options:\n"
	"  --peer-port PORT    port of the cases (default: 1234)\n"
	"  --pick ID, --skip ID\n"
	"  --like FILE         cases in the order of another vsock_test's --list\n"
	"  --transport NAME    vmci: nothing is read behind the peer's close\n"
	"  --describe          tell the other half the cases first\n";

enum {
	CONTROL_HOST = 1,
	CONTROL_PORT,
	CONTROL_VSOCK,
	MODE,
	PEER_CID,
	PEER_PORT,
	LIST,
	SKIP,
	PICK,
	LIKE,
	TRANSPORT,
	DESCRIBE,
	LOCAL_CID,
	RELAY,
	TELL,
	LOG,
};

static const struct option names[] = {
	{"control-host", required_argument, NULL, CONTROL_HOST},
	{"control-port", required_argument, NULL, CONTROL_PORT},
	{"control-vsock", required_argument, NULL, CONTROL_VSOCK},
	{"mode", required_argument, NULL, MODE},
	{"peer-cid", required_argument, NULL, PEER_CID},
	{"peer-port", required_argument, NULL, PEER_PORT},
	{"list", no_argument, NULL, LIST},
	{"skip", required_argument, NULL, SKIP},
	{"pick", required_argument, NULL, PICK},
	{"like", required_argument, NULL, LIKE},
	{"transport", required_argument, NULL, TRANSPORT},
	{"describe", no_argument, NULL, DESCRIBE},
	{"local-cid", no_argument, NULL, LOCAL_CID},
	{"relay", required_argument, NULL, RELAY},
	{"tell", required_argument, NULL, TELL},
	{"log", required_argument, NULL, LOG},
	{NULL, 0, NULL, 0},
};

int main(int count, char **arguments)
{
	const char *host = NULL, *port = NULL, *relay_end = NULL, *status = NULL, *log = NULL;
	unsigned int control_vsock = 0;
	bool has_mode = false, describes = false, picked = false;
	int option;

	for (size_t at = 0; at < sizeof(order) / sizeof(*order); at++)
		add_case(order[at]);
	while ((option = getopt_long(count, arguments, "", names, NULL)) != -1) {
		switch (option) {
		case CONTROL_HOST:
			host = optarg;
			break;
		case CONTROL_PORT:
			port = optarg;
			break;
		case CONTROL_VSOCK:
			control_vsock = number_of(optarg, "--control-vsock");
			break;
		case MODE:
			has_mode = !strcmp(optarg, "client") || !strcmp(optarg, "server");
			options.mode = strcmp(optarg, "client") ? SERVER : CLIENT;
			break;
		case PEER_CID:
			options.peer_cid = number_of(optarg, "--peer-cid");
			break;
		case PEER_PORT:
			options.peer_port = number_of(optarg, "--peer-port");
			break;
		case LIST:
			list_cases();
			return EXIT_SUCCESS;
		case SKIP:
			skipped[case_number(optarg)] = true;
			break;
		case PICK:
			if (!picked)
				memset(skipped, true, sizeof(skipped));
			picked = true;
			skipped[case_number(optarg)] = false;
			break;
		case LIKE:
			order_like(optarg);
			break;
		case TRANSPORT:
			options.no_read_after_close = !strcmp(optarg, "vmci");
			break;
		case DESCRIBE:
			describes = true;
			break;
		case LOCAL_CID:
			printf("%u\n", local_cid());
			return EXIT_SUCCESS;
		case RELAY:
			relay_end = optarg;
			options.mode = strcmp(optarg, "listen") ? SERVER : CLIENT;
			break;
		case TELL:
			status = optarg;
			break;
		case LOG:
			log = optarg;
			break;
		default:
			fputs(usage, stderr);
			return 2;
		}
	}
	signal(SIGPIPE, SIG_IGN);
	signal(SIGALRM, on_alarm);
	srand(time(NULL));
	if (relay_end && port && control_vsock)
		return relay(control_vsock, port, !strcmp(relay_end, "listen"), describes);
	if (status && control_vsock) {
		control_open_vsock(control_vsock);
		return tell(status, log);
	}
	if (optind != count || !has_mode || (!port && !control_vsock) || (port && !host && options.mode == CLIENT)) {
		fputs(usage, stderr);
		return 2;
	}
	if (control_vsock)
		control_open_vsock(control_vsock);
	else
		control_open_tcp(host ? host : "0.0.0.0", port, options.mode == SERVER);
	if (describes)
		describe();
	for (int at = 0; at < case_count; at++)
		run_case(at);
	control_complete();
	return EXIT_SUCCESS;
}
