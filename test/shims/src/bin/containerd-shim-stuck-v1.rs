fn main() {
    hearth_test_shims::run::<hearth_test_shims::StuckShim>();
}
