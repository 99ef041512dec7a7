/* Hostile: log lines without end. */
#include <string.h>
#include <unistd.h>

int main(void)
{
	static char block[65536];
	memset(block, 'e', sizeof block);
	for (unsigned i = 99; i < sizeof block; i += 100)
		block[i] = '\n';
	for (;;)
		write(2, block, sizeof block);
}
