package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// What every server of a cluster has in common is stored in etcd, encrypted by
// the server token, and handed to joining servers. Key and derivation are those
// of k3s (pkg/cluster/encrypt.go, storage.go); the encoding of the value is the
// stand-in's own.
const keyRounds = 4096

// shared are the files, relative to the server directory.
func shared(o *options) []string {
	files := []string{"tls/service.key", "cred/ipsec.psk"}
	for _, a := range authorities {
		files = append(files, "tls/"+a.file+".crt", "tls/"+a.file+".key")
	}
	if o.is("secrets-encryption") {
		files = append(files, "cred/encryption-config.json")
	}
	return files
}

func readShared(o *options) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, name := range shared(o) {
		content, err := os.ReadFile(o.dataDir("server", name))
		if err != nil {
			return nil, err
		}
		out[name] = content
	}
	return out, nil
}

func writeShared(o *options, files map[string][]byte) error {
	for name, content := range files {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("the cluster's bootstrap data names a file %q", name)
		}
		if err := writeFile(o.dataDir("server", name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func storageKey(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return "/bootstrap/" + hex.EncodeToString(sum[:])[:12]
}

func sealer(secret string, salt []byte) (cipher.AEAD, error) {
	key, err := pbkdf2.Key(sha256.New, secret, salt, keyRounds, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// saveBootstrap stores the files, if no server did.
func (e *etcd) saveBootstrap(ctx context.Context, secret string) error {
	have, err := e.loadBootstrap(ctx, secret)
	if err != nil || have != nil {
		return err
	}
	files, err := readShared(e.o)
	if err != nil {
		return err
	}
	plain, err := json.Marshal(files)
	if err != nil {
		return err
	}
	salt := make([]byte, 8)
	_, _ = rand.Read(salt) // never fails
	aead, err := sealer(secret, salt)
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce)
	sealed := hex.EncodeToString(salt) + ":" + base64.StdEncoding.EncodeToString(aead.Seal(nonce, nonce, plain, nil))
	_, err = e.ctl(ctx, []byte(sealed), nil, "put", storageKey(secret))
	return err
}

// loadBootstrap returns the stored files, or nil when there are none.
func (e *etcd) loadBootstrap(ctx context.Context, secret string) (map[string][]byte, error) {
	out, err := e.ctl(ctx, nil, nil, "get", storageKey(secret), "--print-value-only")
	if err != nil {
		return nil, err
	}
	stored := strings.TrimSpace(string(out))
	if stored == "" {
		keys, err := e.ctl(ctx, nil, nil, "get", "/bootstrap", "--prefix", "--keys-only")
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(keys)) != "" {
			return nil, errors.New("bootstrap data already found and encrypted with different token")
		}
		return nil, nil
	}
	salt, sealed, _ := strings.Cut(stored, ":")
	rawSalt, err := hex.DecodeString(salt)
	if err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(sealed)
	if err != nil {
		return nil, err
	}
	aead, err := sealer(secret, rawSalt)
	if err != nil {
		return nil, err
	}
	if len(raw) < aead.NonceSize() {
		return nil, errors.New("the bootstrap data in etcd is too short")
	}
	plain, err := aead.Open(nil, raw[:aead.NonceSize()], raw[aead.NonceSize():], nil)
	if err != nil {
		return nil, fmt.Errorf("decrypting the bootstrap data: %w", err)
	}
	var files map[string][]byte
	return files, json.Unmarshal(plain, &files)
}
