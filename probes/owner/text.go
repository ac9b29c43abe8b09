package owner

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxName = 253 // bytes: Kubernetes allows no more for names of objects

// printable makes a name of anything: valid UTF-8 of printable characters, at most 253
// bytes. What is none is replaced by U+FFFD.
func printable(s string) string {
	if len(s) > maxName { // also so that not all of a huge one is looked at
		s = s[:maxName]
	}
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(s, string(utf8.RuneError)))
	for len(s) > maxName {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return strings.Clone(s) // and let go of what it was cut from
}
