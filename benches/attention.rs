//! Attention, with and without the memory loss, and to a cache.

mod table;

fn main() {
    table::run(dtmem::bench::Group::Attention);
}
