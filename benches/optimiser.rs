//! The norm of gradients, and updates.

mod table;

fn main() {
    table::run(dtmem::bench::Group::Optimiser);
}
