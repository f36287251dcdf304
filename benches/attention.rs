//! Attention, with and without the memory loss, and to a cache.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Attention));
}
