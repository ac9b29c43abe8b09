package dashboards

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// gridWidth is how many columns Grafana's grid has.
const gridWidth = 24

// A row has a title and lines of panels.
type row struct {
	title     string
	collapsed bool // not asked for until it is opened
	lines     []line
}

// A line of panels is that high, in Grafana's units of 30 pixels, and fills the
// width of the grid.
type line struct {
	height uint32
	panels []*panel
}

func rowOf(title string, lines ...line) row { return row{title: title, lines: lines} }

func collapsed(title string, lines ...line) row {
	return row{title: title, collapsed: true, lines: lines}
}

func lineOf(height uint32, panels ...*panel) line { return line{height, panels} }

// lay places rows below each other.
func lay(rows []row) ([]dashboard.PanelOrRowPanel, error) {
	var (
		all    []dashboard.PanelOrRowPanel
		errs   []error
		id, y  uint32
		nextID = func() uint32 { id++; return id }
	)
	for _, r := range rows {
		head := dashboard.RowPanel{
			Type: "row", Id: nextID(), Title: &r.title, Collapsed: r.collapsed,
			GridPos: &dashboard.GridPos{H: 1, W: gridWidth, Y: y}, Panels: []dashboard.Panel{},
		}
		y++
		below := y
		var panels []dashboard.Panel
		for _, l := range r.lines {
			if err := l.share(below); err != nil {
				errs = append(errs, fmt.Errorf("row %q: %w", r.title, err))
			}
			for _, p := range l.panels {
				p.Id = cog.ToPtr(nextID())
				panels = append(panels, p.Panel)
			}
			below += l.height
		}
		if r.collapsed {
			head.Panels = panels
			panels = nil
		} else {
			y = below
		}
		all = append(all, dashboard.PanelOrRowPanel{RowPanel: &head})
		for _, p := range panels {
			all = append(all, dashboard.PanelOrRowPanel{Panel: &p})
		}
	}
	return all, errors.Join(errs...)
}

// share gives each panel of the line its place.
func (l line) share(y uint32) error {
	var errs []error
	left, without := uint32(gridWidth), uint32(0)
	for _, p := range l.panels {
		errs = append(errs, p.err)
		if p.GridPos == nil {
			p.GridPos = &dashboard.GridPos{}
		}
		if p.GridPos.W == 0 {
			without++
		}
		left -= min(left, p.GridPos.W)
	}
	x := uint32(0)
	for _, p := range l.panels {
		w := p.GridPos.W
		if w == 0 {
			w = left / cmp.Or(without, 1)
			left -= w
			without--
		}
		p.GridPos = &dashboard.GridPos{X: x, Y: y, W: w, H: l.height}
		x += w
	}
	if x != gridWidth {
		errs = append(errs, fmt.Errorf("a line is %d columns wide, want %d", x, gridWidth))
	}
	return errors.Join(errs...)
}
