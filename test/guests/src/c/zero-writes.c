/* Hostile: spends its time in host calls that do nothing. */
#include <unistd.h>

int main(void)
{
	for (;;) {
		write(1, "", 0);
		write(2, "", 0);
	}
}
