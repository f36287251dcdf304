//! The norm of gradients, and updates.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Optimiser));
}
