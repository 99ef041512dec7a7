/* Needs more memory at start than a small limit allows: built with an initial
 * memory of 64 MiB. */
#include <stdio.h>

int main(void)
{
	fputs("Content-Type: text/plain\r\n\r\nbig\n", stdout);
	return 0;
}
