package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// newCertificate makes one for 127.0.0.1 that signs itself, as files and as a value.
func newCertificate(t *testing.T, serial int64) (files [2]string, certificate tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "sockq"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secret := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	if certificate, err = tls.X509KeyPair(public, secret); err != nil {
		t.Fatal(err)
	}
	return [2]string{string(public), string(secret)}, certificate
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// users are those of a web configuration: alice, whose password is alice123,
// at the least cost that there is.
const users = "basic_auth_users:\n  alice: $2b$04$abcdefghijklmnopqrstuuCiRP6uwuebOgMsb3sB1n0pjVVBf0O3K\n"

// writeConfig writes a web configuration.
func writeConfig(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "web.yml")
	write(t, path, text)
	return path
}

// everyPath is all that is served.
var everyPath = []string{"/", "/metrics", pathSnapshot, pathHealthy, pathReady}

// The web configuration is the toolkit's: it guards every path, at each address that is
// listened on.
func TestPasswords(t *testing.T) {
	defer goleak.VerifyNone(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	second := free.Addr().String()
	free.Close()
	first, stop := start(t, newFakeNode(), "--web.config.file="+writeConfig(t, users), "--web.listen-address="+second)
	for _, root := range []string{first, "http://" + second} {
		for _, path := range everyPath {
			for password, want := range map[string]int{"": 401, "wrong": 401, "alice123": 200} {
				at := root + path
				if password != "" {
					at = strings.Replace(at, "//", "//alice:"+password+"@", 1)
				}
				resp := ask(t, at)
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != want || want == 401 && string(body) != "Unauthorized\n" {
					t.Errorf("%s: %s %.100q", at, resp.Status, body)
				}
			}
		}
	}
	if r := stop(); r.code != exitOK {
		t.Errorf("exit code %d", r.code)
	}
}

// TLS as the web configuration says, which is read again at each connection.
func TestTLS(t *testing.T) {
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	place := func(name string) string { return filepath.Join(dir, name) }
	files, own := newCertificate(t, 1)
	write(t, place("sockq.crt"), files[0])
	write(t, place("sockq.key"), files[1])
	const withTLS = "tls_server_config:\n  cert_file: sockq.crt\n  key_file: sockq.key\n"
	write(t, place("web.yml"), withTLS+users)
	address, stop := start(t, newFakeNode(), "--web.config.file="+place("web.yml"))
	secure := strings.Replace(address, "http://", "https://alice:alice123@", 1)
	connect := func(config *tls.Config, path string) (proto string, serial int64, err error) {
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM([]byte(files[0]))
		client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true, ForceAttemptHTTP2: true}}
		resp, err := client.Get(secure + path)
		if err != nil {
			return "", 0, err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return "", 0, errors.New(resp.Status)
		}
		return resp.Proto, resp.TLS.PeerCertificates[0].SerialNumber.Int64(), nil
	}

	resp := ask(t, address) // by plain HTTP, until it is there
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 400 || strings.Contains(string(body), "sockq") {
		t.Errorf("plain HTTP: %s %q", resp.Status, body)
	}
	for _, path := range everyPath {
		// HTTP/2 is not spoken, though both ask for it: see newServer.
		if proto, serial, err := connect(&tls.Config{}, path); err != nil || proto != "HTTP/1.1" || serial != 1 {
			t.Errorf("%s: %s, certificate %d, %v", path, proto, serial, err)
		}
	}
	if _, _, err := connect(&tls.Config{MaxVersion: tls.VersionTLS11}, "/"); err == nil {
		t.Error("TLS 1.1 is spoken")
	}

	files, _ = newCertificate(t, 2)
	write(t, place("sockq.crt"), files[0])
	write(t, place("sockq.key"), files[1])
	if _, serial, err := connect(&tls.Config{}, "/"); err != nil || serial != 2 {
		t.Errorf("the certificate was not renewed: %d, %v", serial, err)
	}

	clients, client := newCertificate(t, 3)
	write(t, place("clients.crt"), clients[0])
	write(t, place("web.yml"), withTLS+"  client_ca_file: clients.crt\n  client_auth_type: RequireAndVerifyClientCert\n")
	for name, test := range map[string]struct {
		certificates []tls.Certificate
		welcome      bool
	}{
		"none": {}, "a stranger's": {certificates: []tls.Certificate{own}}, "the right one": {[]tls.Certificate{client}, true},
	} {
		present := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // whoever is asked for
			return &append(test.certificates, tls.Certificate{})[0], nil
		}
		if _, _, err := connect(&tls.Config{GetClientCertificate: present}, "/metrics"); (err == nil) != test.welcome {
			t.Errorf("with %s of a client's certificates: %v", name, err)
		}
	}

	write(t, place("web.yml"), "no configuration\n")
	if _, _, err := connect(&tls.Config{}, "/"); err == nil {
		t.Error("served without the configuration")
	}
	r := stop()
	if r.code != exitOK {
		t.Errorf("exit code %d", r.code)
	}
	for _, secret := range []string{"$2b$04$", "PRIVATE KEY", "alice123"} {
		if strings.Contains(r.said, secret) {
			t.Errorf("the log says %s:\n%s", secret, r.said)
		}
	}
}

// Neither pages nor the log tell what sockq was given in confidence, what is in the
// command lines and environments of processes, its own among them, or who connects.
func TestNothingConfidentialIsTold(t *testing.T) {
	const secret, stranger = "c0nf1dent1al", "127.0.10.81"
	t.Setenv("SOCKQ_TEST", secret)
	token := filepath.Join(t.TempDir(), "token")
	write(t, token, secret)
	p := launch(t, as{}, "--web.config.file="+writeConfig(t, "http_server_config: {headers: {Strict-Transport-Security: "+secret+"}}"),
		fmt.Sprintf("--kubelet.url=https://me:%s@127.0.0.1:1/pods?token=%[1]s", secret), "--kubelet.token-file="+token, "--log.level=debug")
	at, err := url.Parse(p.url)
	if err != nil {
		t.Fatal(err)
	}
	to, err := net.ResolveTCPAddr("tcp", at.Host)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range everyPath {
		c := dial(t, to, stranger)
		_, _ = fmt.Fprintf(c, "GET %s?%s HTTP/1.0\r\nX-Secret: %s\r\n\r\n", path, secret, secret)
		answer, err := io.ReadAll(c)
		header, page, _ := strings.Cut(string(answer), "\r\n\r\n")
		if err != nil || !strings.HasPrefix(header, "HTTP/1.0 200") {
			t.Errorf("%s: %q, %v", path, header, err)
		}
		for _, confidential := range []string{secret, stranger, token, "SOCKQ_TEST", "--kubelet"} {
			if i := strings.Index(page, confidential); i >= 0 {
				t.Errorf("%s tells %s: %q", path, confidential, page[max(0, i-100):min(len(page), i+100)])
			}
		}
	}
	if strings.Contains(p.log.String(), secret) {
		t.Errorf("the log tells the secret:\n%s", &p.log)
	}
}
