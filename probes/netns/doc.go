// Package netns names network namespaces, finds paths by which they can be
// entered, and enters them where that is unavoidable.
//
// A network namespace is told from others by the inode number of its nsfs file,
// as ls -l /proc/self/ns/net shows it. The kernel gives out the lowest free
// number, so the number of a namespace that is gone soon names another one.
package netns
