/* Answers with everything it was given: arguments, environment and body. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

int main(int argc, char **argv)
{
	const char *status = getenv("HTTP_X_ECHO_STATUS");
	const char *extra = getenv("HTTP_X_ECHO_HEADER");
	char buf[16384];
	ssize_t n;

	if (status)
		printf("Status: %s\r\n", status);
	if (extra)
		printf("X-Echo: %s\r\n", extra);
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	for (int i = 0; i < argc; i++)
		printf("argv[%d]=%s\n", i, argv[i]);
	for (char **e = environ; *e; e++)
		printf("%s\n", *e);
	fputs("--- body ---\n", stdout);
	while ((n = read(0, buf, sizeof buf)) > 0)
		fwrite(buf, 1, (size_t)n, stdout);
	return 0;
}
