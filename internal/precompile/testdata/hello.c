#include <stdio.h>

int main(void) {
  printf("Content-Type: text/plain\r\n\r\nhello from C\n");
  return 0;
}
