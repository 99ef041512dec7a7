/* Hostile when asked to be: with the query "spin" it never ends, else it
 * answers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void)
{
	const char *q = getenv("QUERY_STRING");
	if (q && strcmp(q, "spin") == 0)
		for (volatile unsigned i = 0;; i++)
			;
	fputs("Content-Type: text/plain\r\n\r\nfine\n", stdout);
	return 0;
}
