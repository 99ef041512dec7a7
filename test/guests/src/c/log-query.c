/* Writes its query to standard error and a short answer. */
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
	const char *q = getenv("QUERY_STRING");

	fprintf(stderr, "asked %s\n", q ? q : "");
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\nlogged\n", stdout);
	return 0;
}
