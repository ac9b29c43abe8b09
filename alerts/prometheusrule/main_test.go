package main

import (
	"os"
	"reflect"
	"testing"

	"go.yaml.in/yaml/v2"
)

func TestPrometheusRuleIsOfTheRules(t *testing.T) {
	rules, err := os.ReadFile("../rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	made, err := os.ReadFile("../prometheusrule.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if string(made) != string(wrap(rules)) {
		t.Error("alerts/prometheusrule.yaml is old: go generate ./alerts/...")
	}
	var plain, object map[string]any
	if err := yaml.Unmarshal(rules, &plain); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(made, &object); err != nil {
		t.Fatal(err)
	}
	spec, _ := object["spec"].(map[any]any)
	if object["kind"] != "PrometheusRule" || len(plain) != 1 || !reflect.DeepEqual(spec["groups"], plain["groups"]) {
		t.Error("indented, the rules are not the same")
	}
}
