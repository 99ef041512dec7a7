/* Hostile: bytes where a CGI header should be. */
#include <unistd.h>

int main(void)
{
	static const char junk[] = "\x00\xff\xfe this is no header \x01\x02\n\nnor a body\n";
	write(1, junk, sizeof junk - 1);
	return 0;
}
