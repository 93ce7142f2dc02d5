/* Many Ed25519 signatures in one call, which lets the interpreter's other threads run for all of them.
 *
 * No cryptography is here: `open` and `sign` are libsodium's crypto_sign_open and crypto_sign, whose addresses PyNaCl
 * gives (protocol/signatures.py), so every signature is judged by the very function that judges one alone.
 */
#include <stdint.h>
#include <string.h>

#define VERSION 1
#define KEY 32
#define SIGNATURE 64
#define MESSAGE 32

typedef int (*open_function)(unsigned char *, unsigned long long *, const unsigned char *, unsigned long long,
                             const unsigned char *);
typedef open_function sign_function; /* of the same form, with a secret key for a public one */

int64_t ichiba_signatures_version(void) { return VERSION; }

/* checks: count rows of public key, signature, message (128 bytes). right: count bytes, 1 for a signature that is. */
void ichiba_signatures_check(open_function open, const uint8_t *checks, int64_t count, uint8_t *right) {
    unsigned char opened[SIGNATURE + MESSAGE];
    unsigned long long length;
    for (int64_t i = 0; i < count; i++, checks += KEY + SIGNATURE + MESSAGE)
        right[i] = open(opened, &length, checks + KEY, SIGNATURE + MESSAGE, checks) == 0 && length == MESSAGE;
}

/* secret: 64 bytes, libsodium's form. messages: count rows of 32 bytes; made: count rows of 64. Returns how many were
 * made: all, or as many as before the first failure. */
int64_t ichiba_signatures_make(sign_function sign, const uint8_t *secret, const uint8_t *messages, int64_t count,
                               uint8_t *made) {
    unsigned char signed_message[SIGNATURE + MESSAGE];
    unsigned long long length;
    for (int64_t i = 0; i < count; i++) {
        if (sign(signed_message, &length, messages + i * MESSAGE, MESSAGE, secret)) return i;
        memcpy(made + i * SIGNATURE, signed_message, SIGNATURE);
    }
    return count;
}
