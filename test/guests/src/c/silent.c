/* Hostile: ends well without saying anything. */
int main(void) { return 0; }
