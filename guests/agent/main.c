// SPDX-License-Identifier: Apache-2.0
// The default guest's agent: runs programs and carries files for the host, over vsock.
//
//   softkvm-agent [PORT]
//   softkvm-agent =FD      one connection, at a descriptor that is open: for tests
//
// It listens at PORT (1023), and has a process for each connection. On a connection messages go to and fro, each a header
// of 8 bytes (type, 3 bytes that are zero, length of what follows, little endian) and up to 64 KiB; the host's side is
// src/softkvm/vmm/guest/agent.py, which has the same table of types. A connection carries one program or one file. When
// it ends, the program's process group gets SIGHUP, and SIGKILL a second later.

#include "system.h"

enum {
    VERSION = 1,
    PORT = 1023,
    MOST = 1 << 16,        // bytes of a message
    WINDOW = 1 << 16,      // bytes for the program's input that the host may send before some have been acknowledged
    MOST_STRINGS = 4096,   // arguments and variables of a program
    GRACE_MS = 1000,
    LOOK_MS = 50,
};

enum type {
    // the host's
    HELLO = 1,
    EXEC,   // flags, rows, columns, argc, envc (u32); directory, arguments, variables, each ended by NUL
    STDIN,  // nothing: its end
    SIGNAL, // u32
    RESIZE, // rows, columns (u32)
    PUT,    // mode (u32), path, NUL; then DATA up to one of no bytes
    GET,    // path, NUL
    DATA,
    POWER_OFF,
    // ours
    STARTED = 32, // process (u32)
    STDOUT,       // nothing: its end
    STDERR,
    TAKEN,  // bytes of STDIN that the program has taken (u32)
    EXITED, // status, signal (u32); the last message
    FAILED, // errno (u32), what (text); the last message
    FILE_,  // mode (u32), size (u64); then DATA up to one of no bytes
    DONE,
};

enum { TTY = 1 };

struct header {
    uint8_t type;
    uint8_t zero[3];
    uint32_t length;
};

struct sockaddr_vm {
    uint16_t family;
    uint16_t zero;
    uint32_t port;
    uint32_t cid;
    uint8_t flags;
    uint8_t rest[3];
};

struct winsize_ {
    uint16_t rows, columns, x, y;
};

enum { AF_VSOCK = 40, SOCK_STREAM = 1, SOCK_CLOEXEC = 02000000, VMADDR_CID_ANY = -1U };

static int channel;
static uint8_t message[MOST];
static char *strings[MOST_STRINGS + 2];

// --- messages

static int write_all(int fd, const void *data, size_t size) {
    const char *at = data;
    while (size) {
        long written = CALL3(write, fd, at, size);
        if (written == -EINTR || written == -EAGAIN)
            continue;
        if (written <= 0)
            return -1;
        at += written;
        size -= written;
    }
    return 0;
}

static _Noreturn void leave(int status) {
    CALL1(exit_group, status);
    for (;;)
        ;
}

static void send(enum type type, const void *data, uint32_t length) {
    struct header header = {.type = type, .length = length};
    if (write_all(channel, &header, sizeof header) || (length && write_all(channel, data, length)))
        leave(1);
}

static _Noreturn void fail(long error, const char *what) {
    uint8_t data[4 + 256];
    uint32_t code = -error;
    size_t length = strlen(what);
    if (length > 256)
        length = 256;
    memcpy(data, &code, 4);
    memcpy(data + 4, what, length);
    send(FAILED, data, 4 + length);
    leave(1);
}

static int read_all(void *data, size_t size) {
    char *at = data;
    while (size) {
        long got = CALL3(read, channel, at, size);
        if (got == -EINTR)
            continue;
        if (got <= 0)
            return -1;
        at += got;
        size -= got;
    }
    return 0;
}

// Reads a message; its length in *length, -1 when the connection has ended.
static int receive(uint32_t *length) {
    struct header header;
    if (read_all(&header, sizeof header))
        return -1;
    if (header.length > MOST)
        fail(-EMSGSIZE, "message");
    if (read_all(message, header.length))
        return -1;
    *length = header.length;
    return header.type;
}

static uint32_t number(uint32_t at, uint32_t length) {
    uint32_t value = 0;
    if (at + 4 > length)
        fail(-EINVAL, "message is too short");
    memcpy(&value, message + at, 4);
    return value;
}

// Returns the text at *at, and moves *at behind it.
static char *text(uint32_t *at, uint32_t length) {
    char *found = (char *)message + *at;
    while (*at < length)
        if (!message[(*at)++])
            return found;
    fail(-EINVAL, "text without an end");
}

// --- programs

static uint8_t input[WINDOW];
static uint32_t input_begin, input_size; // a ring
static int input_ended;

static void set_size(int fd, uint32_t rows, uint32_t columns) {
    struct winsize_ size = {.rows = rows, .columns = columns};
    CALL3(ioctl, fd, 0x5414, &size); // TIOCSWINSZ
}

static void execute(char **argv, char **envp) {
    static char path[4096 + 256];
    const char *name = argv[0], *search = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    long error = -ENOENT;
    for (const char *at = name; *at; at++)
        if (*at == '/') {
            error = CALL3(execve, name, argv, envp);
            search = "";
            break;
        }
    for (char **variable = envp; *variable && *search; variable++)
        if ((*variable)[0] == 'P' && (*variable)[1] == 'A' && (*variable)[2] == 'T' && (*variable)[3] == 'H' &&
            (*variable)[4] == '=')
            search = *variable + 5;
    size_t name_length = strlen(name);
    while (*search) {
        size_t length = 0;
        while (search[length] && search[length] != ':')
            length++;
        if (length && length + name_length + 2 <= sizeof path) {
            memcpy(path, search, length);
            path[length] = '/';
            memcpy(path + length + 1, name, name_length + 1);
            long found = CALL3(execve, path, argv, envp);
            if (found != -ENOENT && found != -ENOTDIR)
                error = found;
        }
        search += length + (search[length] == ':');
    }
    fail(error, name);
}

// In the child: its descriptors are these, and nothing else is open there.
static _Noreturn void become(char **argv, char **envp, const char *directory, int in, int out, int err, int tty, int report) {
    sigset_t none = 0;
    CALL4(rt_sigprocmask, SIG_SETMASK, &none, 0, 8);
    for (int signal = 1; signal < 65; signal++) {
        struct sigaction default_ = {0};
        CALL4(rt_sigaction, signal, &default_, 0, 8);
    }
    CALL0(setsid);
    channel = report; // what fails is told there
    if (tty)
        CALL3(ioctl, in, 0x540E, 0); // TIOCSCTTY
    if (*directory) {
        long error = CALL1(chdir, directory);
        if (error)
            fail(error, directory);
    }
    CALL3(dup3, in, 0, 0);
    CALL3(dup3, out, 1, 0);
    CALL3(dup3, err, 2, 0);
    execute(argv, envp);
    leave(127);
}

static int open_tty(int *slave, uint32_t rows, uint32_t columns) {
    int number = 0, unlock = 0;
    char name[] = "/dev/pts/0000000000";
    long master = CALL4(openat, AT_FDCWD, "/dev/ptmx", O_RDWR | O_CLOEXEC | O_NOCTTY, 0);
    if (master < 0)
        fail(master, "/dev/ptmx");
    CALL3(ioctl, master, 0x40045431, &unlock); // TIOCSPTLCK
    long error = CALL3(ioctl, master, 0x80045430, &number); // TIOCGPTN
    if (error)
        fail(error, "/dev/ptmx");
    char *at = name + 9, digits[11];
    int count = 0;
    do
        digits[count++] = '0' + number % 10;
    while (number /= 10);
    while (count)
        *at++ = digits[--count];
    *at = 0;
    error = CALL4(openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC | O_NOCTTY, 0);
    if (error < 0)
        fail(error, name);
    *slave = error;
    set_size(master, rows, columns);
    return master;
}

static void pipe(int *ends) {
    long error = CALL2(pipe2, ends, O_CLOEXEC);
    if (error)
        fail(error, "pipe");
}

struct program {
    int process, signals;  // signals: of SIGCHLD
    int in, out, err, tty; // -1: closed
    int hung_up;           // nobody has the terminal open, for now: it is looked at again
    int ended, status;
};

static void take_input(struct program *program) {
    while (input_size) {
        uint32_t piece = WINDOW - input_begin;
        if (piece > input_size)
            piece = input_size;
        long taken = CALL3(write, program->in, input + input_begin, piece);
        if (taken == -EINTR)
            continue;
        if (taken == -EAGAIN)
            return;
        uint32_t gone = taken;
        if (taken < 0) { // it does not read any more: what comes is taken, and lost
            if (!program->tty)
                CALL1(close, program->in);
            program->in = -1;
            gone = input_size;
        }
        input_begin = (input_begin + gone) % WINDOW;
        input_size -= gone;
        send(TAKEN, &gone, 4);
        if (program->in < 0)
            return;
    }
    if (input_ended) {
        if (program->tty) {
            uint8_t end = 4; // VEOF of a new terminal
            CALL3(write, program->in, &end, 1);
        } else {
            CALL1(close, program->in);
        }
        program->in = program->tty ? program->in : -1;
        input_ended = 0;
    }
}

static void put_input(struct program *program, const uint8_t *data, uint32_t length) {
    if (!length) {
        input_ended = 1;
    } else if (program->in < 0) {
        send(TAKEN, &length, 4);
    } else if (length > WINDOW - input_size) {
        fail(-EPROTO, "more input than the window has room for");
    } else {
        for (uint32_t i = 0; i < length; i++)
            input[(input_begin + input_size + i) % WINDOW] = data[i];
        input_size += length;
    }
}

// Hands output on; 0 when there is no more.
static int give_output(int fd, enum type type) {
    static uint8_t data[MOST];
    long got = CALL3(read, fd, data, sizeof data);
    if (got == -EINTR || got == -EAGAIN)
        return 1;
    if (got <= 0) // a terminal that nobody has open any more reads as EIO
        return 0;
    send(type, data, got);
    return 1;
}

static void host_says(struct program *program) {
    uint32_t length;
    int type = receive(&length);
    if (type == STDIN) {
        put_input(program, message, length);
    } else if (type == SIGNAL) {
        if (!program->ended)
            CALL2(kill, -program->process, number(0, length));
    } else if (type == RESIZE) {
        if (program->tty && program->out >= 0)
            set_size(program->out, number(0, length), number(4, length));
    } else if (type < 0) { // nobody is there any more
        CALL2(kill, -program->process, SIGHUP);
        CALL2(kill, -program->process, SIGCONT);
        struct pollfd wait = {.fd = program->signals, .events = POLLIN};
        CALL3(poll, &wait, 1, GRACE_MS);
        CALL2(kill, -program->process, SIGKILL);
        leave(0);
    } else {
        fail(-EPROTO, "message");
    }
}

static void reap(struct program *program) {
    uint8_t information[128];
    CALL3(read, program->signals, information, sizeof information);
    int status = 0;
    if (CALL4(wait4, program->process, &status, WNOHANG, 0) == program->process) {
        program->ended = 1;
        program->status = status;
    }
}

static void set_nonblocking(int fd) {
    CALL3(fcntl, fd, F_SETFL, O_NONBLOCK);
}

static void serve(struct program *program) {
    for (;;) {
        int writing = program->in >= 0 && (input_size || input_ended);
        struct pollfd wait[] = {
            {.fd = channel, .events = POLLIN},
            {.fd = program->ended ? -1 : program->signals, .events = POLLIN},
            {.fd = program->hung_up ? -1 : program->out, .events = POLLIN},
            {.fd = program->err, .events = POLLIN},
            {.fd = writing ? program->in : -1, .events = POLLOUT},
        };
        // What has ended may have left its output to others, who are not waited for.
        long ready = CALL3(poll, wait, 5, program->ended || program->hung_up ? LOOK_MS : -1);
        program->hung_up = 0;
        if (ready == -EINTR)
            continue;
        if (program->ended && (ready == 0 || (program->out < 0 && program->err < 0))) {
            int signal = program->status & 0x7f;
            uint32_t exited[2] = {signal ? 0 : program->status >> 8 & 0xff, signal};
            send(EXITED, exited, sizeof exited);
            return;
        }
        if (wait[0].revents)
            host_says(program);
        if (wait[4].revents)
            take_input(program);
        if (wait[2].revents && !give_output(program->out, STDOUT)) {
            // A program may close its terminal before it exits. To close our end would be SIGHUP for it.
            program->hung_up = program->tty && !program->ended;
            if (!program->hung_up) {
                send(STDOUT, 0, 0);
                CALL1(close, program->out);
                program->in = program->tty ? -1 : program->in;
                program->out = -1;
            }
        }
        if (wait[3].revents && !give_output(program->err, STDERR)) {
            send(STDERR, 0, 0);
            CALL1(close, program->err);
            program->err = -1;
        }
        if (wait[1].revents)
            reap(program);
    }
}

static void run(uint32_t length) {
    uint32_t flags = number(0, length), rows = number(4, length), columns = number(8, length);
    uint32_t argc = number(12, length), envc = number(16, length), at = 20;
    if (!argc || argc > MOST_STRINGS || envc > MOST_STRINGS - argc)
        fail(-E2BIG, "arguments");
    char *directory = text(&at, length);
    char **argv = strings, **envp = strings + argc + 1;
    for (uint32_t i = 0; i < argc; i++)
        argv[i] = text(&at, length);
    argv[argc] = 0;
    for (uint32_t i = 0; i < envc; i++)
        envp[i] = text(&at, length);
    envp[envc] = 0;

    struct program program = {.err = -1, .tty = flags & TTY};
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1}, report[2], slave = -1;
    if (program.tty) {
        program.in = program.out = open_tty(&slave, rows, columns);
    } else {
        pipe(in);
        pipe(out);
        pipe(err);
        program.in = in[1], program.out = out[0], program.err = err[0];
    }
    pipe(report);
    sigset_t child = 1UL << (SIGCHLD - 1);
    CALL4(rt_sigprocmask, SIG_BLOCK, &child, 0, 8);
    struct sigaction default_ = {0};
    CALL4(rt_sigaction, SIGCHLD, &default_, 0, 8);
    program.signals = CALL4(signalfd4, -1, &child, 8, O_CLOEXEC);
    program.process = CALL0(fork);
    if (program.process < 0)
        fail(program.process, "fork");
    if (!program.process)
        become(argv, envp, directory, program.tty ? slave : in[0], program.tty ? slave : out[1],
               program.tty ? slave : err[1], program.tty, report[1]);
    CALL1(close, report[1]);
    // What the child says before it has become the program is a message of ours: why it has not.
    static uint8_t trouble[sizeof(struct header) + 4 + 256];
    long said = CALL3(read, report[0], trouble, sizeof trouble);
    while (said > 0 && said < (long)sizeof trouble) {
        long more = CALL3(read, report[0], trouble + said, sizeof trouble - said);
        if (more <= 0)
            break;
        said += more;
    }
    if (said > 0) {
        write_all(channel, trouble, said);
        leave(1);
    }
    CALL1(close, report[0]);
    int *theirs[] = {&in[0], &out[1], &err[1], &slave};
    for (int i = 0; i < 4; i++)
        if (*theirs[i] >= 0)
            CALL1(close, *theirs[i]);
    set_nonblocking(program.in);
    uint32_t process = program.process;
    send(STARTED, &process, 4);
    serve(&program);
}

// --- files

static void put(uint32_t length) {
    static char path[4096], temporary[4096 + 16];
    uint32_t mode = number(0, length), at = 4;
    char *name = text(&at, length);
    size_t size = strlen(name);
    if (size >= sizeof path)
        fail(-ENAMETOOLONG, "path");
    memcpy(path, name, size + 1);
    memcpy(temporary, name, size);
    memcpy(temporary + size, ".softkvm-put", 13);
    long fd = CALL4(openat, AT_FDCWD, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        fail(fd, path);
    for (;;) {
        int type = receive(&length);
        if (type != DATA) {
            CALL1(unlink, temporary);
            if (type < 0)
                leave(1);
            fail(-EPROTO, "message");
        }
        if (!length)
            break;
        for (uint32_t done = 0; done < length;) {
            long written = CALL3(write, fd, message + done, length - done);
            if (written == -EINTR)
                continue;
            if (written <= 0) {
                CALL1(unlink, temporary);
                fail(written ? written : -EIO, path);
            }
            done += written;
        }
    }
    long error = CALL2(fchmod, fd, mode & 07777);
    if (!error)
        error = CALL2(rename, temporary, path);
    if (error) {
        CALL1(unlink, temporary);
        fail(error, path);
    }
    send(DONE, 0, 0);
}

static void get(uint32_t length) {
    uint32_t at = 0;
    struct stat status;
    char *path = text(&at, length);
    long fd = CALL4(openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
    if (fd < 0)
        fail(fd, path);
    long error = CALL2(fstat, fd, &status);
    if (!error && (status.st_mode & S_IFMT) == S_IFDIR)
        error = -EISDIR;
    if (error)
        fail(error, path);
    struct {
        uint32_t mode;
        uint64_t size;
    } __attribute__((packed)) file = {status.st_mode & 07777, status.st_size};
    send(FILE_, &file, sizeof file);
    for (;;) {
        long got = CALL3(read, fd, message, MOST);
        if (got == -EINTR)
            continue;
        if (got < 0)
            fail(got, "read");
        send(DATA, message, got);
        if (!got)
            break;
    }
}

// --- connections

static void session(void) {
    uint32_t length;
    for (;;) {
        int type = receive(&length);
        uint32_t version = VERSION;
        switch (type) {
        case HELLO:
            send(HELLO, &version, 4);
            break;
        case EXEC:
            run(length);
            return;
        case PUT:
            put(length);
            break;
        case GET:
            get(length);
            break;
        case POWER_OFF:
            CALL0(sync);
            send(DONE, 0, 0);
            CALL4(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
            return;
        default:
            if (type >= 0)
                fail(-EPROTO, "message");
            return;
        }
    }
}

static uint32_t parse(const char *text) {
    uint32_t value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (*text - '0');
    return value;
}

int main(int argc, char **argv) {
    uint32_t port = argc > 1 ? parse(argv[1]) : PORT;
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    CALL4(rt_sigaction, SIGPIPE, &ignore, 0, 8);
    if (argc > 1 && argv[1][0] == '=') {
        channel = parse(argv[1] + 1);
        CALL3(fcntl, channel, F_SETFD, FD_CLOEXEC);
        session();
        return 0;
    }
    CALL4(rt_sigaction, SIGCHLD, &ignore, 0, 8); // sessions are not waited for
    long listener = CALL3(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_vm address = {.family = AF_VSOCK, .port = port, .cid = VMADDR_CID_ANY};
    if (listener < 0 || CALL3(bind, listener, &address, sizeof address) || CALL2(listen, listener, 64))
        return 1;
    for (;;) {
        long accepted = CALL4(accept4, listener, 0, 0, SOCK_CLOEXEC);
        if (accepted < 0)
            continue;
        if (!CALL0(fork)) {
            CALL1(close, listener);
            channel = accepted;
            session();
            return 0;
        }
        CALL1(close, accepted);
    }
}
