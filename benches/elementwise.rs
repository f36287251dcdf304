//! Activation, dropout and residual sums, element by element.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Elementwise));
}
