/* The hello guest with some 100 KB of code behind it, as a function with a few
 * libraries has: what is compiled and shipped, though one request runs little
 * of it. The marker is as in hello.c. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static const char marker[] =
	"HEARTH-MARKER-0000000000000000000000000000000000";

/* Each function differs in its constants, so that none is folded into another. */
#define STEP(n)                                                                \
	static uint32_t step##n(uint32_t x, uint32_t y)                        \
	{                                                                      \
		for (uint32_t i = 0; i < (y & 7u) + 1u; i++) {                 \
			x = (x ^ (n * 2654435761u)) + (y << (n % 13 + 1));     \
			if (x % (n + 3u) == 0)                                 \
				y += x / (n + 7u);                             \
			else if (x & (1u << (n % 31)))                         \
				y ^= x * (n * 40503u + 1u);                    \
			x = (x << (n % 17 + 1)) | (x >> (31 - n % 17));        \
		}                                                              \
		return x + y;                                                  \
	}
#define TEN(m, t) m(t##0) m(t##1) m(t##2) m(t##3) m(t##4) m(t##5) m(t##6) m(t##7) m(t##8) m(t##9)
#define HUNDRED(m, h) TEN(m, h##0) TEN(m, h##1) TEN(m, h##2) TEN(m, h##3) TEN(m, h##4) \
	TEN(m, h##5) TEN(m, h##6) TEN(m, h##7) TEN(m, h##8) TEN(m, h##9)
#define ALL(m) HUNDRED(m, 1) HUNDRED(m, 2) HUNDRED(m, 3) HUNDRED(m, 4) HUNDRED(m, 5) HUNDRED(m, 6)

ALL(STEP)

#define NAME(n) step##n,
static uint32_t (*const steps[])(uint32_t, uint32_t) = { ALL(NAME) };

int main(void)
{
	const char *volatile text = marker;
	const char *query = getenv("QUERY_STRING");
	uint32_t n = query == NULL ? 0 : (uint32_t)atoi(query);

	n = steps[n % (sizeof steps / sizeof *steps)](n, 1);
	printf("Content-Type: text/plain; charset=utf-8\r\n\r\n%s\n", text);
	fprintf(stderr, "%u\n", (unsigned)n);
	return 0;
}
