//! Token rows.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Tokens));
}
