package owner

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// podList is what a kubelet answers, with much of what nobody reads here left out.
const podList = `{"kind":"PodList","apiVersion":"v1","metadata":{"items":["no"]},"items":[
{"metadata":{"name":"web-0","namespace":"shop","uid":"U","labels":{"app":"web"}},"spec":{"containers":[{"name":"server"}]},
 "status":{"phase":"Running","containerStatuses":[{"name":"server","containerID":"containerd://A","ready":true},{"name":"late","containerID":""}],
 "initContainerStatuses":[{"name":"migrate","containerID":"containerd://1"}],"ephemeralContainerStatuses":[{"name":"debug","containerID":"containerd://2"}]}},
{"metadata":{"name":"proxy","namespace":"kube-system","uid":"S"},"spec":{"hostNetwork":true},"status":{"containerStatuses":[{"name":"proxy","containerID":"cri-o://B"}]}},
{"metadata":{"name":"new","namespace":"shop","uid":"N"},"status":{"phase":"Pending"}}
],"more":{}}`

const uidNew = "1f0e1d2c-3b4a-4968-8778-695a4b3c2d1e"

var fillPodList = strings.NewReplacer(`"U"`, `"`+uid+`"`, `"S"`, `"`+uidStatic+`"`, `"N"`, `"`+uidNew+`"`, "//A", "//"+idA, "//B", "//"+idB, "//1", "//"+containerID(1), "//2", "//"+containerID(2))

// openKubelet is a Finder that asks a kubelet about the processes 10 in container A
// and 11 in B.
func openKubelet(t *testing.T, opts Options, log io.Writer) (*Finder, *fakeProc) {
	t.Helper()
	p := newFakeProc(t)
	p.add(10, 1, "app", 1, "0::/"+idA+"\n")
	p.add(11, 1, "app", 1, "0::/"+idB+"\n")
	opts.ProcFS, opts.Logger = p.dir, slog.New(slog.NewTextHandler(log, nil))
	return open(t, opts), p
}

func wantServer(t *testing.T, f *Finder) {
	t.Helper()
	wantOwner(t, f, Owner{PID: 10, Process: "app", Runtime: "containerd", Container: idA, ContainerName: "server", Pod: "web-0", Namespace: "shop", PodUID: uid}, 10)
}

func answer(t *testing.T, body string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) }))
	t.Cleanup(s.Close)
	return s
}

func TestKubelet(t *testing.T) {
	f, p := openKubelet(t, Options{Kubelet: answer(t, fillPodList.Replace(podList)).URL + "/pods"}, t.Output())
	wantServer(t, f)
	wantOwner(t, f, Owner{PID: 11, Process: "app", Runtime: "cri-o", Container: idB, ContainerName: "proxy", Pod: "proxy", Namespace: "kube-system", PodUID: uidStatic, HostNetwork: true}, 11)
	for n, want := range map[int]string{1: "migrate", 2: "debug"} {
		p.add(12, 1, "app", n, "0::/"+containerID(n)+"\n")
		wantOwner(t, f, Owner{PID: 12, Process: "app", Runtime: "containerd", Container: containerID(n), ContainerName: want, Pod: "web-0", Namespace: "shop", PodUID: uid}, 12)
	}
	// So new that the kubelet does not know its containers.
	p.add(14, 1, "app", 1, "0::/kubepods/pod"+uidNew+"/"+containerID(4)+"\n")
	wantOwner(t, f, Owner{PID: 14, Process: "app", Container: containerID(4), Pod: "new", Namespace: "shop", PodUID: uidNew}, 14)
	// The sandbox is not in the list, but its cgroup tells the pod.
	p.add(13, 1, "pause", 1, "0::/kubepods/pod"+uidStatic+"/"+containerID(3)+"\n")
	wantOwner(t, f, Owner{PID: 13, Process: "pause", Container: containerID(3), Pod: "proxy", Namespace: "kube-system", PodUID: uidStatic, HostNetwork: true}, 13)
	if source, err := f.Pods(); source != "kubelet" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
}

// The token is read anew for each request, and given to nobody but the kubelet.
func TestKubeletWithToken(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("redirected with %v", r.Header) }))
	defer other.Close()
	redirect := false
	kubelet := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case redirect:
			http.Redirect(w, r, other.URL, http.StatusFound)
		case r.Header.Get("Authorization") != "Bearer second":
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
		default:
			fmt.Fprint(w, fillPodList.Replace(podList))
		}
	}))
	kubelet.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	kubelet.StartTLS()
	defer kubelet.Close()
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ca := write("ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: kubelet.Certificate().Raw}))
	token := write("token", []byte("first\n"))
	nameless := Owner{PID: 10, Process: "app", Container: idA}

	t.Run("unknown authority", func(t *testing.T) {
		log := new(bytes.Buffer)
		f, _ := openKubelet(t, Options{Kubelet: kubelet.URL, KubeletToken: token}, log)
		wantOwner(t, f, nameless, 10)
		if !strings.Contains(log.String(), "certificate") {
			t.Errorf("logged: %s", log)
		}
	})
	t.Run("rotated", func(t *testing.T) {
		log := new(bytes.Buffer)
		f, _ := openKubelet(t, Options{Kubelet: kubelet.URL, KubeletToken: token, KubeletCA: ca}, log)
		now := newClock()
		f.pods.now = now.now
		wantOwner(t, f, nameless, 10)
		if !strings.Contains(log.String(), "401") || strings.Contains(log.String(), "first") {
			t.Errorf("logged: %s", log)
		}
		write("token", []byte("second\n"))
		now.pass(readEvery)
		wantServer(t, f)
	})
	t.Run("any certificate", func(t *testing.T) {
		f, _ := openKubelet(t, Options{Kubelet: kubelet.URL, KubeletToken: token, KubeletInsecure: true}, t.Output())
		wantServer(t, f)
	})
	t.Run("no token", func(t *testing.T) {
		log := new(bytes.Buffer)
		f, _ := openKubelet(t, Options{Kubelet: kubelet.URL, KubeletToken: filepath.Join(dir, "none"), KubeletInsecure: true}, log)
		wantOwner(t, f, nameless, 10)
		if !strings.Contains(log.String(), "no such file") {
			t.Errorf("logged: %s", log)
		}
	})
	t.Run("redirect", func(t *testing.T) {
		redirect = true
		f, _ := openKubelet(t, Options{Kubelet: kubelet.URL, KubeletToken: token, KubeletInsecure: true}, t.Output())
		wantOwner(t, f, nameless, 10)
	})
}

func TestKubeletIsNotThere(t *testing.T) {
	s := answer(t, "")
	s.Close()
	log := new(bytes.Buffer)
	f, _ := openKubelet(t, Options{Kubelet: strings.Replace(s.URL, "//", "//me:secret@", 1) + "?token=secret"}, log)
	wantOwner(t, f, Owner{PID: 10, Process: "app", Container: idA}, 10)
	if !strings.Contains(log.String(), "connection refused") || strings.Contains(log.String(), "secret") {
		t.Errorf("logged: %s", log)
	}
}

// endless is text that never ends.
type endless struct {
	text string
	read int
}

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.text[e.read%len(e.text)]
		e.read++
	}
	return len(p), nil
}

// However much there is, no more than the bounds is read of it.
func TestBoundsOfPodList(t *testing.T) {
	for name, test := range map[string]struct {
		begins, text string
		most         int
	}{
		"pods": {`{"items":[{}`, `,{"x":"` + strings.Repeat("x", 1<<16) + `"}`, maxPodList},
		"pod":  {`{"items":[{},{"x":"`, "x", maxPod},
		"key":  {`{"`, "x", maxPod},
	} {
		t.Run(name, func(t *testing.T) {
			rest := &endless{text: test.text}
			err := readPods(io.MultiReader(strings.NewReader(test.begins), rest), newPodTable(10))
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("more than %d MiB", test.most>>20)) {
				t.Errorf("%v", err)
			}
			if rest.read > test.most {
				t.Errorf("%d bytes were read", rest.read)
			}
		})
	}
}

func TestHostileKubelet(t *testing.T) {
	for name, answer := range map[string]struct {
		body io.Reader
		want string // in the log
	}{
		"nothing":          {strings.NewReader(""), "EOF"},
		"no JSON":          {strings.NewReader("hello"), "invalid character"},
		"no list":          {strings.NewReader(`[]`), "no list of pods"},
		"items of no list": {strings.NewReader(`{"items":{}}`), "no list of pods"},
		"no pods":          {strings.NewReader(`{"items":[]}`), ""},
		"null":             {strings.NewReader(`{"items":null}`), ""},
		"cut":              {strings.NewReader(`{"items":[{"metadata":{"name":"x"}}`), "EOF"},
		"of another type":  {strings.NewReader(`{"items":[{"metadata":{"name":1}}]}`), "cannot unmarshal"},
		"pods without end": {io.MultiReader(strings.NewReader(`{"items":[{}`), &endless{text: `,{"x":"` + strings.Repeat("x", 1<<16) + `"}`}), "more than 32 MiB"},
		"small ones":       {io.MultiReader(strings.NewReader(`{"items":[{}`), &endless{text: ",{}"}), "more than 32 MiB"},
		"one without end":  {io.MultiReader(strings.NewReader(`{"items":[{},{"x":"`), &endless{text: "x"}), "a pod has more than 2 MiB"},
		"a key":            {io.MultiReader(strings.NewReader(`{"`), &endless{text: "x"}), "a pod has more than 2 MiB"},
		"depth":            {io.MultiReader(strings.NewReader(`{"items":[`), &endless{text: "["}), "exceeded max depth"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, answer.body) }))
			defer s.Close()
			log := new(bytes.Buffer)
			f, _ := openKubelet(t, Options{Kubelet: s.URL}, log)
			start := time.Now()
			wantOwner(t, f, Owner{PID: 10, Process: "app", Container: idA}, 10)
			if passed := time.Since(start); passed > 2*readTime {
				t.Errorf("took %v", passed)
			}
			// On a busy machine the time may be up first.
			got := log.String()
			if fine := answer.want == ""; fine && got != "" || !fine && !strings.Contains(got, answer.want) && !strings.Contains(got, errLate.Error()) {
				t.Errorf("logged: %s", got)
			}
		})
	}
	t.Run("names", func(t *testing.T) {
		body := fmt.Sprintf(`{"items":[{"metadata":{"name":%q,"namespace":"a\nb"},"status":{"containerStatuses":[{"name":"\u0000","containerID":"%s://%s"},{"containerID":"://"}]}}]}`,
			strings.Repeat("p", 1<<20), strings.Repeat("r", 1<<10), idA)
		f, _ := openKubelet(t, Options{Kubelet: answer(t, body).URL}, t.Output())
		wantOwner(t, f, Owner{
			PID: 10, Process: "app", Runtime: strings.Repeat("r", maxName), Container: idA,
			ContainerName: "�", Pod: strings.Repeat("p", maxName), Namespace: "a�b",
		}, 10)
	})
}
