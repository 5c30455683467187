// SPDX-License-Identifier: Apache-2.0
// The guest's half of the network benchmark: net ADDRESS PORT CASE AMOUNT. Cases: `receive` and `send` AMOUNT MiB of TCP,
// `round` AMOUNT single bytes there and back, `datagram` the same by UDP, `connect` AMOUNT connections. Prints the time.
// ADDRESS `host` is the machine monitor's by vsock, in place of TCP.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static char buffer[1 << 17];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void must(int right, const char *what) {
    if (!right) {
        perror(what);
        exit(1);
    }
}

static int opened_by_vsock(int port) {
    struct sockaddr_vm peer = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    must(fd >= 0, "socket");
    must(!connect(fd, (struct sockaddr *)&peer, sizeof peer), "connect");
    return fd;
}

static int opened(const char *address, int port, int type) {
    if (!strcmp(address, "host")) return opened_by_vsock(port);
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, fd = socket(AF_INET, type, 0);
    must(fd >= 0, "socket");
    must(inet_aton(address, &peer.sin_addr), "address");
    must(!connect(fd, (struct sockaddr *)&peer, sizeof peer), "connect");
    if (type == SOCK_STREAM) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

int main(int argc, char **argv) {
    must(argc == 5, "arguments");
    const char *address = argv[1], *kind = argv[3];
    int port = atoi(argv[2]);
    long amount = atol(argv[4]);
    int type = strcmp(kind, "datagram") ? SOCK_STREAM : SOCK_DGRAM;
    int fd = strcmp(kind, "connect") ? opened(address, port, type) : -1;
    double start = now_s();
    if (!strcmp(kind, "receive")) {
        must(write(fd, "r", 1) == 1, "write");
        for (long left = amount << 20; left > 0;) {
            ssize_t n = read(fd, buffer, sizeof buffer);
            must(n > 0, "read");
            left -= n;
        }
    } else if (!strcmp(kind, "send")) {
        must(write(fd, "s", 1) == 1, "write");
        for (long left = amount << 20; left > 0;) {
            ssize_t n = write(fd, buffer, left < (long)sizeof buffer ? left : (long)sizeof buffer);
            must(n > 0, "write");
            left -= n;
        }
        shutdown(fd, SHUT_WR);
        must(read(fd, buffer, 1) == 1, "read");  // all has arrived
    } else if (!strcmp(kind, "round") || !strcmp(kind, "datagram")) {
        if (type == SOCK_STREAM) must(write(fd, "e", 1) == 1, "write");
        for (long n = 0; n < amount; n++) {
            must(write(fd, "x", 1) == 1, "write");
            must(read(fd, buffer, 1) == 1, "read");
        }
    } else {
        for (long n = 0; n < amount; n++) close(opened(address, port, type));
    }
    printf("net %s %ld %.6f\n", kind, amount, now_s() - start);
    return 0;
}
