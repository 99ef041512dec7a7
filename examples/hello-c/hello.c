/*
 * The smallest useful Hearth function in C: the request is in the environment
 * and on standard input, as RFC 3875 (CGI) describes, and the response goes to
 * standard output.
 */
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
	const char *path = getenv("PATH_INFO");
	const char *name = getenv("GREETING_NAME");

	if (!path || !*path)
		path = "/";
	if (!name || !*name)
		name = "world";

	/* The header block ends with an empty line; the rest is the body. */
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	printf("Hello, %s, from C! You asked for %s\n", name, path);

	/* Standard error goes to the function's log. */
	fprintf(stderr, "greeted %s\n", name);
	return 0;
}
