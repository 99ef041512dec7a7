/* Writes QUERY_STRING ("<chunks>") lines, 200 ms apart, each flushed. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(void)
{
	const char *q = getenv("QUERY_STRING");
	int chunks = q && *q ? atoi(q) : 5;
	struct timespec pause = {0, 200 * 1000 * 1000};

	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	for (int i = 0; i < chunks; i++) {
		printf("chunk %d\n", i);
		fflush(stdout);
		nanosleep(&pause, 0);
	}
	return 0;
}
