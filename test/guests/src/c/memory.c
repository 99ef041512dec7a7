/* Takes and touches memory until there is no more, then says how much it got.
 * Being refused memory is no fault, so this is a good answer. Grows memory
 * itself: a compiler may assume that an unused malloc succeeds. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	enum { page = 65536 };
	char line[96];
	unsigned long pages = 0;

	for (;;) {
		unsigned long at = __builtin_wasm_memory_grow(0, 16);
		if (at == (unsigned long)-1)
			break;
		for (unsigned long i = 0; i < 16; i++)
			*(volatile char *)((at + i) * page) = 0x5A;
		pages += 16;
	}
	int n = snprintf(line, sizeof line,
			 "Content-Type: text/plain; charset=utf-8\r\n\r\n%lu\n", pages / 16);
	write(1, line, (size_t)n);
	return 0;
}
