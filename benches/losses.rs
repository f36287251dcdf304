//! Losses of actions.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Losses));
}
