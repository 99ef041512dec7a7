/* Hostile: a header block without end. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
	const char line[] = "X-Header: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n";
	for (;;)
		write(1, line, sizeof line - 1);
}
