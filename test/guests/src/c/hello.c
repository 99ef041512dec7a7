/* Answers with a line that a test can change in the compiled module: marker
 * lives in a data segment, and package guests replaces it byte for byte. */
#include <stdio.h>

static const char marker[] =
	"HEARTH-MARKER-0000000000000000000000000000000000";

int main(void)
{
	/* Read through a volatile pointer so that no part of the text is folded
	 * into code. */
	const char *volatile text = marker;
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\n", stdout);
	puts(text);
	return 0;
}
