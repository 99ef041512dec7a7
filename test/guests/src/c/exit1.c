/* Hostile: fails with a word about it in the log. */
#include <stdio.h>

int main(void)
{
	fputs("configuration missing\n", stderr);
	return 1;
}
