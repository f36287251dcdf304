//! What observations become: one-hot codes by a linear map, or by convolutions.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Embeddings));
}
