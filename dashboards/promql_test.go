package dashboards

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A parsed query is as much of one as the rules need to know. That Prometheus takes
// it, and has an answer, is tested with a real one.
type parsed struct {
	selectors []selector
	grouping  []string // labels of by, on and group_left
}

type selector struct {
	metric   string
	matchers []matcher
	window   string
	function string // that it is an argument of
}

type matcher struct{ label, op, value string }

var (
	functions = []string{
		"sum", "max", "min", "count", "topk", "bottomk", "rate", "increase", "abs", "time", "histogram_quantile",
		"present_over_time", "min_over_time", "max_over_time", "label_replace", "vector",
	}
	operators = []string{"and", "or", "unless", "bool"}
	lists     = []string{"by", "on", "group_left"}

	identifier = regexp.MustCompile(`^[a-zA-Z_:][a-zA-Z0-9_:]*`)
	oneMatcher = regexp.MustCompile(`^([a-z_]+)(=~|!~|!=|=)"([^"\\]*)"(?:, )?`)
	number     = regexp.MustCompile(`^[0-9.]+`)
	literal    = regexp.MustCompile(`^"[^"\\]*"`)
)

func parse(expr string) (parsed, error) {
	var (
		p    parsed
		open []string // calls and parentheses around
		rest = expr
	)
	bad := func(what string) (parsed, error) { return p, fmt.Errorf("%s at %q", what, rest) }
	for rest != "" {
		word := identifier.FindString(rest)
		switch {
		case word != "":
			rest = strings.TrimPrefix(rest, word)
			list, isList := strings.CutPrefix(strings.TrimLeft(rest, " "), "(")
			switch {
			case strings.HasPrefix(rest, "{"):
				s := selector{metric: word}
				if len(open) > 0 {
					s.function = open[len(open)-1]
				}
				rest = rest[1:]
				for {
					m := oneMatcher.FindStringSubmatch(rest)
					if m == nil {
						break
					}
					s.matchers = append(s.matchers, matcher{m[1], m[2], m[3]})
					rest = rest[len(m[0]):]
				}
				if !strings.HasPrefix(rest, "}") {
					return bad("no matcher")
				}
				rest = rest[1:]
				if strings.HasPrefix(rest, "[") {
					s.window, rest, _ = strings.Cut(rest[1:], "]")
				}
				p.selectors = append(p.selectors, s)
			case slices.Contains(lists, word) && isList:
				labels, after, closed := strings.Cut(list, ")")
				if !closed {
					return bad("no end")
				}
				for _, l := range strings.Split(labels, ",") {
					if l = strings.TrimSpace(l); l != "" {
						p.grouping = append(p.grouping, l)
					}
				}
				rest = after
				// sum by (…) (…): what follows is its argument.
			case slices.Contains(functions, word) && (isList || strings.HasPrefix(rest, " by (")):
				if isList {
					open, rest = append(open, word), list
				}
			case slices.Contains(operators, word):
			default:
				return bad("unknown word " + word + " before")
			}
		case rest[0] == '(':
			open, rest = append(open, ""), rest[1:]
		case rest[0] == ')':
			if len(open) == 0 {
				return bad("nothing to close")
			}
			open, rest = open[:len(open)-1], rest[1:]
		case strings.ContainsRune(" ,+-*/<>=", rune(rest[0])):
			rest = rest[1:]
		case strings.HasPrefix(rest, "@ end()"):
			rest = strings.TrimPrefix(rest, "@ end()")
		case literal.MatchString(rest):
			rest = strings.TrimPrefix(rest, literal.FindString(rest))
		case number.MatchString(rest):
			rest = strings.TrimPrefix(rest, number.FindString(rest))
		default:
			return bad("strange")
		}
	}
	if len(open) > 0 {
		return p, fmt.Errorf("%d parentheses are not closed", len(open))
	}
	return p, nil
}
