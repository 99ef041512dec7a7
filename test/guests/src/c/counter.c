/* State that survives a request would show here: every number is 1 and the
 * heap is all zero, for ever. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int data = 0x5eed;   /* .data, so that a reset must restore it */
static int bss;             /* .bss */

int main(void)
{
	enum { size = 1 << 20 };
	unsigned char *heap = malloc(size);
	int dirty = 0;

	for (int i = 0; heap && i < size; i += 64)
		dirty += heap[i] == 0xA5;
	if (heap)
		memset(heap, 0xA5, size);
	data++;
	bss++;
	FILE *f = fopen("/state", "w");
	setenv("LEAKED", "yes", 1);
	printf("Content-Type: text/plain; charset=utf-8\r\n\r\n");
	printf("data=%d bss=%d dirty=%d file=%s\n", data - 0x5eed, bss, dirty,
	       f ? "opened" : "refused");
	return 0;
}
