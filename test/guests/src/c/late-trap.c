/* Hostile: streams part of an answer, then traps. */
#include <stdio.h>
#include <time.h>

int main(void)
{
	struct timespec pause = {0, 300 * 1000 * 1000};
	fputs("Content-Type: text/plain\r\n\r\nfirst half\n", stdout);
	fflush(stdout);
	nanosleep(&pause, 0);
	__builtin_trap();
}
