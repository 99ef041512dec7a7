// The well-behaved and the hostile C guest of the engine's tests in one:
// PATH_INFO says what to do.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <wasi/api.h>

extern char **environ;
static int counter;

static const char *var(const char *name) {
  const char *v = getenv(name);
  return v ? v : "";
}

static void ok(void) { printf("Content-Type: text/plain\r\n\r\n"); }

// Needs nothing of C's own stack, so that it is the engine's that overflows.
static volatile int depth;
__attribute__((noinline)) static int recurse(int n) {
  int r = recurse(n + 1);
  depth = n;
  return r + n;
}

// Fills the stack that the engine keeps for compiled code, to the depth given,
// and stays there for as long as any test.
__attribute__((noinline)) static int descend(int n) {
  if (n == 0) return (int)sleep(1000);
  int r = descend(n - 1);
  depth = n;
  return r + n;
}

static int is(const char *path) { return strcmp(var("PATH_INFO"), path) == 0; }

int main(int argc, char **argv) {
  if (is("/") || is("/hello")) {
    ok();
    printf("hello from c\n");
  } else if (is("/env")) {
    ok();
    printf("argv0=%s argc=%d\n", argv[0], argc);
    for (char **e = environ; *e; e++) printf("%s\n", *e);
  } else if (is("/echo")) {
    static char buf[65536];
    size_t n;
    printf("Content-Type: application/octet-stream\n\n");
    fflush(stdout);
    while ((n = fread(buf, 1, sizeof buf, stdin)) > 0) fwrite(buf, 1, n, stdout);
  } else if (is("/count")) {
    long total = 0;
    static char buf[65536];
    ssize_t n;
    while ((n = read(0, buf, sizeof buf)) > 0) total += n;
    if (n < 0) return 9;
    ok();
    printf("%ld\n", total);
  } else if (is("/state")) {
    ok();
    printf("%d\n", ++counter);
  } else if (is("/random")) {
    unsigned char b[16];
    ok();
    if (getentropy(b, sizeof b)) return 3;
    for (int i = 0; i < 16; i++) printf("%02x", b[i]);
  } else if (is("/time")) {
    ok();
    printf("%ld\n", (long)time(NULL));
  } else if (is("/status")) {
    printf("Status: 418 I'm a teapot\nX-Own: yes\nConnection: X-Own-Hop\nX-Own-Hop: no\nHearth-Fault: forged\nContent-Type: text/plain\n\nshort and stout");
  } else if (is("/redirect")) {
    printf("Location: /elsewhere\n\n");
  } else if (is("/nocontent")) {
    printf("Status: 204\n\n");
  } else if (is("/large")) {
    static char kib[1024];
    memset(kib, 'x', sizeof kib);
    ok();
    for (int i = 0; i < 1024; i++) fwrite(kib, 1, sizeof kib, stdout);
  } else if (is("/stream")) {
    ok();
    for (int i = 0; i < 3; i++) {
      printf("part %d\n", i);
      fflush(stdout);
      usleep(200 * 1000);
    }
  } else if (is("/log")) {
    fprintf(stderr, "first line\nsecond \xff line\n\nunfinished");
    ok();
    printf("logged\n");
  } else if (is("/spin")) {
    for (volatile uint64_t i = 0;; i++) {}
  } else if (is("/recurse")) {
    return recurse(0);
  } else if (is("/deep")) {
    return descend(1000 * 1000);
  } else if (is("/memory")) {
    for (;;) {
      char *p = malloc(1 << 20);
      if (!p) abort();
      *(volatile char *)p = 1;
    }
  } else if (is("/stdout")) {
    ok();
    for (;;) printf("%s", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef");
  } else if (is("/stderr")) {
    for (;;) fprintf(stderr, "%s\n", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde");
  } else if (is("/exit")) {
    fprintf(stderr, "leaving\n");
    return 1;
  } else if (is("/late-exit")) {
    ok();
    printf("begun\n");
    fflush(stdout);
    usleep(100 * 1000);
    return 1;
  } else if (is("/garbage")) {
    printf("this is not a header\n\nbody");
  } else if (is("/nothing")) {
    return 0;
  } else if (is("/trap")) {
    __builtin_trap();
  } else if (is("/sleep")) {
    for (;;) sleep(1000);
  } else if (is("/drip")) { // begins its answer and never ends it
    ok();
    printf("drop\n");
    fflush(stdout);
    for (;;) sleep(1000);
  } else if (is("/nap")) {
    usleep(300 * 1000);
    ok();
    printf("rested\n");
  } else if (is("/stdin")) {
    char b;
    for (;;) (void)!read(0, &b, 1);
  } else if (is("/iovs")) {
    static __wasi_ciovec_t none[1024];
    __wasi_size_t n;
    for (;;) (void)!__wasi_fd_write(2, none, 1024, &n);
  } else if (is("/poll")) {
    static __wasi_subscription_t in[1 << 16];
    static __wasi_event_t out[1 << 16];
    __wasi_size_t n;
    for (;;) (void)!__wasi_poll_oneoff(in, out, 1 << 16, &n);
  } else if (is("/entropy")) {
    static char b[8 << 20];
    for (;;) (void)!__wasi_random_get((uint8_t *)b, sizeof b);
  } else if (is("/files")) {
    ok();
    FILE *f = fopen("/etc/passwd", "r");
    printf("%s\n", f ? "opened" : "refused");
  } else {
    printf("Status: 404\nContent-Type: text/plain\n\nno such mode %s\n", var("PATH_INFO"));
  }
  return 0;
}
