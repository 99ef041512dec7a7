/* Writes QUERY_STRING lines to standard error and a short answer. */
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
	const char *q = getenv("QUERY_STRING");
	int lines = q && *q ? atoi(q) : 3;

	for (int i = 0; i < lines; i++)
		fprintf(stderr, "log line %d\n", i);
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\nlogged\n", stdout);
	return 0;
}
