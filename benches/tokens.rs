//! Token rows.

mod table;

fn main() {
    table::run(dtmem::bench::Group::Tokens);
}
