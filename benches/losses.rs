//! Losses of actions.

mod table;

fn main() {
    table::run(dtmem::bench::Group::Losses);
}
