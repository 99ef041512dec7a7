/* Hostile: begins a good answer, then never ends. */
#include <stdio.h>

int main(void)
{
	fputs("Content-Type: text/plain; charset=utf-8\r\n\r\nstarted\n", stdout);
	fflush(stdout);
	for (volatile unsigned i = 0;; i++)
		;
}
