//! The content-addressed memory, with and without a loss on what is recalled.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Memory));
}
