/* Hostile: reads standard input past its end, for ever. */
#include <unistd.h>

int main(void)
{
	char c;
	for (;;)
		read(0, &c, 1);
}
