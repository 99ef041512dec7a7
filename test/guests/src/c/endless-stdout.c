/* Hostile: a good header, then a body without end. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
	static char block[65536];
	const char head[] = "Content-Type: text/plain\r\n\r\n";
	memset(block, 'x', sizeof block);
	write(1, head, sizeof head - 1);
	for (;;)
		write(1, block, sizeof block);
}
